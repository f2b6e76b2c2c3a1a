/** What `run --record` writes of a VM's guest, against what the guest's module and the host have counted. */
import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type TestContext, test } from "node:test";
import { DISK_BDF } from "../../src/control/disk.ts";
import { GuestRecording } from "../../src/control/guest-recording.ts";
import { demand, MAPS_TRACE } from "../../src/control/guest-side.ts";
import { Recording } from "../../src/control/recording.ts";
import { type Outcome, run } from "../../src/control/run.ts";
import { Vm } from "../../src/control/vm.ts";
import { parseWorkload } from "../../src/control/workload.ts";
import { monotonicClock } from "../../src/host/clock.ts";
import { ensureGuest, type Guest } from "../../src/machine/qemu/guest.ts";
import type { Qemu } from "../../src/machine/qemu/qemu.ts";
import { type LoggedEvent, parseEvent } from "../../src/wire/event-log.ts";
import type { Piece } from "../vectors/driver-case.ts";
import { MACHINE } from "../vectors/driver-cases.ts";
import { bootedGuest, SOURCES, type Twin, writeTwins } from "./broken-modules.ts";
import { KernelModule } from "./kernel-module.ts";
import { vmOptions } from "./support.ts";

/** How exactly the guest's clock is related to ours, and how late a guest may go on after its frames were pinned; ns. */
const CLOCKS_MAX = 20e6;
const WAKE_MAX = 2e9;

interface Recorded {
  readonly events: readonly LoggedEvent[];
  /** What the log says itself of events that it lacks. */
  readonly gap: string | undefined;
  readonly warnings: readonly string[];
}

/** A recording for as long as `work` takes. */
async function recorded(
  t: TestContext,
  work: (recording: Recording, onWarning: (text: string) => void) => Promise<void>,
): Promise<Recorded> {
  const folder = mkdtempSync(join(tmpdir(), "coiommu-test-"));
  t.after(() => rmSync(folder, { recursive: true }));
  const warnings: string[] = [];
  const onWarning = (text: string) => warnings.push(text);
  const file = join(folder, "log");
  const recording = new Recording(file, monotonicClock.now(), onWarning);
  await work(recording, onWarning);
  recording.close();
  const [, ...lines] = readFileSync(file, "utf8").trimEnd().split("\n");
  const gap = lines.at(-1)?.startsWith("# lost ") ? lines.pop()! : undefined;
  const events = lines.map((line) => parseEvent(line) ?? assert.fail(`no event: ${line}`));
  return { events, gap, warnings };
}

/** Of a whole run; without warnings. */
async function recordedRun(t: TestContext, guest: Guest, append: readonly string[] = []) {
  const workload = parseWorkload("fio:rw=randwrite,bs=16k,iodepth=16,seconds=2,size=8M");
  let outcome: Outcome | undefined;
  const { events, warnings } = await recorded(t, async (recording, onWarning) => {
    const options = { ...vmOptions(guest), recording, onWarning, append, workload };
    outcome = await run(
      options,
      () => Vm.start(options),
      () => {},
    );
  });
  const { result, complaints } = outcome!;
  assert.deepEqual([warnings, complaints, result.workload.verified], [[], [], true]);
  return { events, result };
}

const framesOf = ({ ranges }: LoggedEvent) =>
  ranges.flatMap(([first, frames]) => Array.from({ length: frames }, (_, i) => first + i));

/** What of the log contradicts the module's counters, the host, or itself; in words. */
function contradictions({ events, result: { maps } }: Awaited<ReturnType<typeof recordedRun>>): string[] {
  const found: string[] = [];
  const expect = (sound: boolean, what: string) => sound || found.push(what);
  const of = (kind: LoggedEvent["kind"]) => events.filter((event) => event.kind === kind);
  const frames = (list: readonly LoggedEvent[]) =>
    list.reduce((sum, event) => sum + framesOf(event).length, 0);
  const [mapped, unmapped] = [of("map"), of("unmap")];
  const counted = [maps.map, maps.framesMapped, maps.unmap, maps.framesUnmapped];
  const logged = [mapped.length, frames(mapped), unmapped.length, frames(unmapped)];
  expect(`${counted}` === `${logged}`, `the module has counted ${counted}, and the log has ${logged}`);

  const live = new Map<number, number>();
  const last = new Map<number, number>();
  const mappedAt = new Map<number, number[]>();
  for (const event of events) {
    if (event.source === null) continue;
    const { cpu, endpoint } = event.source;
    expect(endpoint === DISK_BDF, `function ${endpoint} has no driver`);
    expect(event.time >= (last.get(cpu) ?? 0), `CPU ${cpu} goes back to ${event.time}`);
    last.set(cpu, event.time);
    for (const frame of framesOf(event)) {
      const count = (live.get(frame) ?? 0) + (event.kind === "map" ? 1 : -1);
      expect(count >= 0, `frame ${frame} is unmapped and was not mapped`);
      live.set(frame, count);
      if (event.kind === "map" && !mappedAt.get(frame)?.push(event.time)) mappedAt.set(frame, [event.time]);
    }
  }
  for (const [frame, count] of live) expect(count === 0, `frame ${frame} stays mapped`);

  // Before, the host pins what firmware may touch.
  const first = mapped[0]?.time ?? Number.POSITIVE_INFINITY;
  const onRequest = of("pinned").filter(({ time }) => time > first - CLOCKS_MAX);
  expect(frames(onRequest) > 32, `${frames(onRequest)} frames were pinned on request`);
  for (const event of onRequest)
    for (const frame of framesOf(event)) {
      const times = mappedAt.get(frame) ?? [];
      const sound = times.some((time) => time > event.time - CLOCKS_MAX && time < event.time + WAKE_MAX);
      expect(sound, `frame ${frame} was pinned and not mapped`);
    }
  const typical = median(delays(events, mappedAt, first - CLOCKS_MAX));
  expect(
    Math.abs(typical) < CLOCKS_MAX,
    `frames are first mapped ${typical / 1e6} ms after they were pinned`,
  );
  return found;
}

/** From the first pin of each frame to its first mapping, of frames that were not pinned before `since`. */
function delays(
  events: readonly LoggedEvent[],
  mappedAt: ReadonlyMap<number, readonly number[]>,
  since: number,
) {
  const pinnedAt = new Map<number, number>();
  for (const event of events)
    if (event.kind === "pinned")
      for (const frame of framesOf(event)) if (!pinnedAt.has(frame)) pinnedAt.set(frame, event.time);
  return [...pinnedAt]
    .filter(([frame, time]) => time > since && mappedAt.has(frame))
    .map(([frame, time]) => mappedAt.get(frame)![0]! - time);
}
const median = (list: readonly number[]): number =>
  list.toSorted((a, b) => a - b)[list.length >> 1] ?? Number.NaN;

const TWINS: readonly Twin[] = [
  {
    what: "forgets to trace some mappings",
    file: "dma_ops.c",
    sound: "trace_coiommu_map(hook, addr, size, 0);",
    broken: "if (!TWIN || size != 1)\n\t\ttrace_coiommu_map(hook, addr, size, 0);",
  },
  {
    what: "forgets to trace what is freed",
    file: "dma_ops.c",
    sound: "trace_coiommu_unmap(hook, addr, size, 0);",
    broken: "if (!TWIN || dir != DMA_BIDIRECTIONAL)\n\t\ttrace_coiommu_unmap(hook, addr, size, 0);",
  },
  {
    what: "traces one page too many",
    file: "trace.h",
    sound: "__entry->size = size;",
    broken: "__entry->size = size + (TWIN ? PAGE_SIZE : 0);",
  },
  {
    what: "traces another address",
    file: "trace.h",
    sound: "__entry->addr = dma_to_phys(&hook->shadow, addr);",
    broken: "__entry->addr = dma_to_phys(&hook->shadow, addr) + (TWIN ? PAGE_SIZE : 0);",
  },
];

test("the log of a VM has every mapping that its module counted, at its time", async (t) => {
  const guest = await ensureGuest((text) => t.diagnostic(text));
  const sound = await recordedRun(t, guest);
  t.diagnostic(JSON.stringify(sound.result.maps));
  assert.deepEqual(contradictions(sound).slice(0, 5), []);

  for (const ms of [-50, 50])
    await t.test(`a clock that is ${ms} ms wrong is found`, (t) => {
      const shifted = ({ time, ...event }: LoggedEvent) => ({
        ...event,
        time: time + (event.source ? ms * 1e6 : 0),
      });
      const [found] = contradictions({ ...sound, events: sound.events.map(shifted) });
      assert.ok(found);
      t.diagnostic(found);
    });
});

test("the log of a module that is broken is found to be wrong", async (t) => {
  const guest = await ensureGuest((text) => t.diagnostic(text), writeTwins(t, TWINS));
  for (const [i, { what }] of TWINS.entries())
    await t.test(`a module that ${what}`, async (t) => {
      const [first] = contradictions(await recordedRun(t, guest, [`coiommu.twin=${i + 1}`]));
      assert.ok(first);
      t.diagnostic(first);
    });
});

const LISTS: readonly (readonly Piece[])[] = [
  [[256, 0, 4096]],
  [
    [300, 100, 4000],
    [256, 0, 8192],
    [256, 0, 1],
  ],
  Array.from({ length: 20 }, (_, i): Piece => [400 + 2 * i, 0, 4096]),
];

/** Map and unmap lists in the module's self-test. */
async function recordLists(t: TestContext, { agent }: Qemu, parameters: string): Promise<Recorded> {
  return await recorded(t, async (recording, onWarning) => {
    recording.head({ memoryMiB: MACHINE.memoryMiB, machine: "qemu", workload: "self-test" });
    const settings = { ...MACHINE, frames: MACHINE.memoryMiB * 256, onWarning };
    const ofGuest = await GuestRecording.begin(agent, recording, settings);
    try {
      await demand(agent, `modprobe coiommu selftest=1 ${parameters}`, "loading the module");
      await demand(agent, `echo 1 >${MAPS_TRACE}/events/coiommu/enable`, "tracing");
      const driver = new KernelModule(agent);
      await driver.reset(64, [], false);
      for (const pieces of LISTS) {
        const pins = pieces.flatMap(([gfn]) => [gfn, gfn + 1]);
        const mapped = await driver.map({ kind: "sg", pieces }, [{ pins, reply: { written: 4, status: 0 } }]);
        assert.equal(mapped.result, "mapped");
        await driver.unmap({ kind: "sg", pieces });
      }
      await ofGuest.end();
    } finally {
      const traces = MAPS_TRACE.replace(/_maps$/, "_*");
      await demand(agent, `rmdir ${traces}; rmmod coiommu`, "unloading the module");
    }
  });
}

const asLogged = LISTS.flatMap((pieces) => {
  const ranges = pieces.map(([gfn, offset, size]) => [gfn, Math.ceil((offset + size) / 4096)]);
  return [
    ["map", ranges],
    ["unmap", ranges],
  ];
});
const kindsAndRanges = ({ events }: Recorded) => events.map(({ kind, ranges }) => [kind, ranges]);

const LIST_TWINS: readonly Twin[] = [
  {
    what: "does not say what is one list",
    file: "trace.h",
    sound: "__entry->left = left;",
    broken: "__entry->left = TWIN ? 0 : left;",
  },
  {
    what: "forgets to trace lists",
    file: "dma_ops.c",
    sound: "if (trace_coiommu_map_enabled())",
    broken: "if (trace_coiommu_map_enabled() && !TWIN)",
  },
  {
    what: "forgets a list's last segment",
    file: "dma_ops.c",
    sound: "for_each_sg(sgl, sg, nents, i)\n\t\tif (map)",
    broken: "for_each_sg(sgl, sg, TWIN ? nents - 1 : nents, i)\n\t\tif (map)",
  },
];

test("a list is one line of the log", async (t) => {
  const qemu = await bootedGuest(writeTwins(t, LIST_TWINS));
  t.after(() => qemu.close());
  const sound = await recordLists(t, qemu, "twin=0");
  assert.deepEqual(kindsAndRanges(sound), asLogged);
  assert.deepEqual(sound.warnings, []);
  for (const [i, { what }] of LIST_TWINS.entries())
    await t.test(`a module that ${what} is found`, async (t) => {
      const broken = await recordLists(t, qemu, `twin=${i + 1}`);
      assert.notDeepEqual(kindsAndRanges(broken), asLogged);
    });
});

test("what the guest's buffer has no room for is told, and what it has is whole", async (t) => {
  const qemu = await bootedGuest(SOURCES);
  t.after(() => qemu.close());
  const { agent } = qemu;
  const times = 200;
  const pieces = LISTS[2]!;
  const { events, gap, warnings } = await recorded(t, async (recording, onWarning) => {
    recording.head({ memoryMiB: MACHINE.memoryMiB, machine: "qemu", workload: "self-test" });
    const settings = { ...MACHINE, frames: MACHINE.memoryMiB * 256, onWarning };
    const ofGuest = await GuestRecording.begin(agent, recording, settings);
    const script = `modprobe coiommu selftest=1; echo 4 >${MAPS_TRACE}/buffer_size_kb; echo 1 >${MAPS_TRACE}/events/coiommu/enable`;
    await demand(agent, script, "loading the module");
    const driver = new KernelModule(agent);
    await driver.reset(64, [], false);
    const pins = pieces.map(([gfn]) => gfn);
    const map = () => driver.map({ kind: "sg", pieces }, [{ pins, reply: { written: 4, status: 0 } }]);
    assert.equal((await map()).result, "mapped");
    await Promise.all(Array.from({ length: times }, () => driver.map({ kind: "sg", pieces }, [])));
    await ofGuest.end();
  });
  const lacking = (times + 1 - events.length) * pieces.length;
  assert.ok(events.length > 0 && lacking > 0);
  for (const { ranges } of events) assert.equal(ranges.length, pieces.length);
  assert.equal(warnings.length, 1);
  const [, missing, full] = /lacks (\d+) of .* for (\d+) of them was full/.exec(warnings[0]!) ?? [];
  assert.equal(Number(missing), lacking);
  assert.equal(gap, `# lost ${lacking}`);
  // The rest is the part of a list for which there was room.
  assert.ok(Number(full) > lacking - 2 * pieces.length && Number(full) <= lacking, warnings[0]);
});
