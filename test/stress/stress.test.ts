/**
 * Goal: what test/sim shows for every schedule of small machines holds for real processors and processes: no count is
 * lost, and no page that a guest relies on is released.
 *
 * Method: processes that share one mmapped table: guests in C (the module's units.c) and in TypeScript (the driver's
 * units.ts), and the production Tracker, which unpins as fast as it can. Its pinner keeps a word per frame that is odd
 * while the page is held and never has a value twice; a guest compares it at map and at unmap.
 *
 * It stands guard against a V8 whose Atomics on a plain ArrayBuffer over mmapped memory were not atomic between
 * processes (docs/adr/0001). A seed repeats what the guests choose, not how the processes interleave.
 */
import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { closeSync, openSync } from "node:fs";
import { availableParallelism } from "node:os";
import { text } from "node:stream/consumers";
import test, { after, before } from "node:test";
import { fileURLToPath } from "node:url";
import { NativeBinary } from "../../bench/native/build.ts";
import type { Gfn } from "../../src/base/units.ts";
import { createMemfd, FdMapper } from "../../src/host/mapping.ts";
import { GuestMemory } from "../../src/memory/guest-memory.ts";
import { DmaTrackingTable } from "../../src/tracking/dtt.ts";
import { TU_ACCESSED, TU_COUNT, TU_PINNED } from "../../src/wire/dtt.ts";
import {
  FIRST,
  FRAMES,
  type GuestTotals,
  type HostTotals,
  heldWord,
  makeTable,
  type Orders,
  RAM,
  ram,
  type Twin,
} from "./arena.ts";

const seed = Number(process.env.STRESS_SEED ?? Date.now() % 2 ** 31);
const REPLAY = `STRESS_SEED=${seed} npx node --test test/stress/stress.test.ts`;

let native: NativeBinary;
before(async () => {
  native = await NativeBinary.build(new URL("guest.c", import.meta.url), "program", console.error);
});
after(() => native?.[Symbol.dispose]());

const script = (name: string) => fileURLToPath(new URL(name, import.meta.url));

interface Run {
  /** Guests by language. */
  readonly c: number;
  readonly typescript: number;
  /** Of each guest, and of the host, at least. */
  readonly maps: number;
  readonly unpins: number;
  readonly pauseMs: number;
  readonly twin?: Twin;
}

interface Outcome {
  readonly guests: readonly GuestTotals[];
  readonly host: HostTotals;
  /** Frames whose unit is not as it must be when nobody maps anything. */
  readonly wrongUnits: readonly string[];
}

async function run({ c, typescript, maps, unpins, pauseMs, twin = "none" }: Run): Promise<Outcome> {
  const mapper = new FdMapper();
  const fd = createMemfd("coiommu-stress", RAM);
  const children: ChildProcess[] = [];
  try {
    const memory = new GuestMemory([ram(mapper, openSync(`/proc/self/fd/${fd}`, "r+"))]);
    const geometry = makeTable(memory);
    const start = <Totals>(command: string, ...args: (string | number)[]): Promise<Totals> => {
      const child = spawn(command, args.map(String), { stdio: ["ignore", "pipe", "pipe", fd] });
      children.push(child);
      return totalsOf<Totals>(child);
    };
    const guests = c + typescript;
    const orders = (id: number): Orders => ({
      ...{ geometry, guests, processes: guests + 1, id, maps, unpins, pauseMs, twin },
      seed: seed + id,
    });
    const node = (name: string, id: number) => [script(name), JSON.stringify(orders(id))] as const;
    const host = start<HostTotals>(process.execPath, ...node("host.ts", guests));
    const totals = Array.from({ length: guests }, (_, id) => {
      if (id >= c) return start<GuestTotals>(process.execPath, ...node("guest.ts", id));
      return start<GuestTotals>(native.path, geometry.root, geometry.levels, guests + 1, id, maps, seed + id);
    });
    const [hostTotals, ...guestTotals] = await Promise.all([host, ...totals]);
    return { guests: guestTotals, host: hostTotals, wrongUnits: wrongUnits(memory, geometry) };
  } finally {
    for (const child of children) child.kill("SIGKILL");
    closeSync(fd);
    mapper.close();
  }
}

/** What a process prints at its end. */
async function totalsOf<Totals>(child: ChildProcess): Promise<Totals> {
  const ended = new Promise((resolve, reject) => child.once("exit", resolve).once("error", reject));
  const [out, errors, code] = await Promise.all([text(child.stdout!), text(child.stderr!), ended]);
  if (code !== 0) throw new Error(`${child.spawnargs[1]} ended with ${code}: ${errors}`);
  return JSON.parse(out);
}

/** Nobody maps anything: COUNT is 0, and P says whether the page is held. */
function wrongUnits(memory: GuestMemory, { root, levels }: Orders["geometry"]): string[] {
  const table = new DmaTrackingTable(memory, root, levels);
  return Array.from({ length: FRAMES }, (_, i) => FIRST + i).flatMap((gfn) => {
    const word = table.load(table.walk(gfn as Gfn));
    const pinned = (word & TU_PINNED) !== 0;
    const held = memory.load32(heldWord(gfn)) % 2 !== 0;
    if ((word & ~(TU_PINNED | TU_ACCESSED)) === 0 && pinned === held) return [];
    return [`frame ${gfn}: 0x${word.toString(16)}, COUNT ${word & TU_COUNT}, ${held ? "" : "not "}held`];
  });
}

const sum = (guests: readonly GuestTotals[], key: keyof GuestTotals): number =>
  guests.reduce((total, guest) => total + guest[key], 0);

/** What went wrong; empty when all went well. */
function wrong({ guests, wrongUnits }: Outcome): string[] {
  const say = (n: number, what: string) => (n === 0 ? [] : [`${n} ${what}`]);
  return [
    ...say(sum(guests, "lost"), "frames were not held while a guest relied on them"),
    ...say(sum(guests, "failed"), "mappings failed"),
    ...say(sum(guests, "mapped") - sum(guests, "unmapped"), "counts were lost"),
    ...wrongUnits.slice(0, 5),
  ];
}

const OPTIONS = {
  timeout: 180_000,
  skip: availableParallelism() < 2 && "there is no race on one processor",
};

/** The host unpins what is idle at once: most mappings ask, many while their frame is being unpinned. */
const HASTY: Run = { c: 2, typescript: 2, maps: 400_000, unpins: 100_000, pauseMs: 0 };
/** The guests are rarely interrupted: they count in the same words at the same time. */
const CROWDED: Run = { c: 2, typescript: 2, maps: 4_000_000, unpins: 0, pauseMs: 1 };

for (const [what, scenario] of [
  ["while the host unpins at once", HASTY],
  ["while they crowd", CROWDED],
] as const)
  test(`guests and host in processes of their own lose no count and no page, ${what}`, OPTIONS, async (t) => {
    const outcome = await run(scenario);
    const { guests, host } = outcome;
    const asked = guests.map((guest) => guest.asked);
    t.diagnostic(
      `${sum(guests, "mapped")} frames mapped, ${asked.join("+")} requests, ${host.pinned} pins, ${host.unpinned} unpins`,
    );
    assert.deepEqual(wrong(outcome), [], `replay with: ${REPLAY}`);
    assert.ok(host.unpinned >= scenario.unpins, `it must be a race: ${host.unpinned} unpins`);
    if (scenario.unpins > 0)
      for (const n of asked) assert.ok(n > 1000, `every guest must be in it: ${asked}`);
  });

for (const [what, scenario] of [
  [
    "an unpin that loads and stores instead of comparing and swapping",
    { ...HASTY, maps: 80_000, unpins: 2_000, twin: "torn-unpin" },
  ],
  [
    "guests that count by loads and stores, as Atomics that are none",
    { ...CROWDED, c: 0, maps: 500_000, twin: "plain-counting" },
  ],
] as const)
  test(`broken twin is caught: ${what}`, OPTIONS, async (t) => {
    let found: string[] = [];
    for (let attempt = 0; attempt < 6 && found.length === 0; attempt++) found = wrong(await run(scenario));
    t.diagnostic(found.join("; "));
    assert.ok(found.length > 0, `replay with: ${REPLAY}`);
  });
