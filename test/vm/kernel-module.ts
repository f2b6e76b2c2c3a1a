/** The kernel module in a running guest as a driver under test, through the debugfs file of its self-test. */
import { demand } from "../../src/control/guest-side.ts";
import type { DmaDirection } from "../../src/driver/dma-api.ts";
import type { GuestAgent } from "../../src/machine/qemu/agent.ts";
import type {
  DriverUnderTest,
  HostAnswer,
  MapOutcome,
  UnitWords,
  UnmapOutcome,
} from "../support/run-driver-case.ts";
import type { Buffers } from "../vectors/driver-case.ts";

/** A line with END after what a command has said. */
const END = ".";
const RUN = `f=/sys/kernel/debug/coiommu/selftest
c() {
  exec 3<>$f && echo "$*" >&3 || { echo "refused: $*"; exit 1; }
  while read -r l <&3; do echo "$l"; done
  exec 3>&-
  echo ${END}
}
`;

const DIRECTIONS = { bidirectional: "both", "to-device": "to", "from-device": "from" } as const;

/** Why a mapping failed, by the counter that says so, and the errno that goes with it. */
const FAILURES: Readonly<Record<string, readonly [result: string, errno: number]>> = {
  no_unit: ["no-unit", 6],
  saturated: ["saturated", 75],
  pin_off: ["off", 19],
  pin_not_seen: ["not-seen", 71],
  pin_lost: ["lost", 110],
  pin_status_ioerr: ["refused IOERR", 5],
  pin_status_unsupp: ["refused UNSUPP", 38],
  pin_status_deverr: ["refused DEVERR", 5],
  pin_status_inval: ["refused INVAL", 22],
  pin_status_range: ["refused RANGE", 34],
  pin_status_noent: ["refused NOENT", 2],
  pin_status_fault: ["refused FAULT", 14],
  pin_status_nomem: ["refused NOMEM", 12],
  pin_status_unknown: ["refused unknown", 5],
};

/** What a command has said: the words of its lines. */
type Lines = readonly (readonly string[])[];

interface Command {
  readonly text: string;
  readonly done: PromiseWithResolvers<Lines>;
}
/** In one round trip, which has a time limit. */
const COMMANDS_MAX = 200;

export class KernelModule implements DriverUnderTest {
  readonly #agent: GuestAgent;
  /** Waiting for the next round trip to the guest. */
  readonly #commands: Command[] = [];
  #sending = false;

  constructor(agent: GuestAgent) {
    this.#agent = agent;
  }

  async reset(
    batchMax: number,
    frames: readonly number[],
    pinDirty: boolean,
    framesMax?: number,
  ): Promise<void> {
    await Promise.all([
      this.#run("reset", batchMax, ...(framesMax === undefined ? [] : [framesMax])),
      this.#run("pin_dirty", pinDirty ? "on" : "off"),
      this.#run("watch", ...frames),
    ]);
  }

  async setUnit(gfn: number, word: number): Promise<void> {
    await this.#run("set", gfn, word);
  }

  async units(): Promise<UnitWords> {
    return unitsOf(await this.#run("units"))[0]!;
  }

  async late(pins: readonly number[]): Promise<void> {
    await this.#run("late", ...pins);
  }

  async device(on: boolean): Promise<void> {
    await this.#run("device", on ? "on" : "off");
  }

  async map({ kind, pieces, direction }: Buffers, host: readonly HostAnswer[]): Promise<MapOutcome> {
    const answers = host.map(({ pins, reply }) =>
      reply === "silence"
        ? this.#run("silence", ...pins)
        : this.#run("answer", reply.written, reply.status, ...pins),
    );
    const turned = this.#turn(direction);
    const mapped = this.#run(`map_${kind}`, ...pieces.flat());
    const [said] = await Promise.all([mapped, turned, ...answers]);
    const units = unitsOf(said);
    return {
      requests: named(said, "request").map(([bytes], i) => ({
        ...{ bytes: Buffer.from(bytes!, "hex"), units: units[i]! },
      })),
      result: resultOf(Number(named(said, "returned")[0]![0]), countersOf(said)),
    };
  }

  async unmap({ kind, pieces, direction }: Buffers): Promise<UnmapOutcome> {
    const turned = this.#turn(direction);
    const [said] = await Promise.all([this.#run(`unmap_${kind}`, ...pieces.flat()), turned]);
    const counters = countersOf(said);
    return { counted: counters.get("frames_unmapped") ?? 0, reported: counters.get("underflow") ?? 0 };
  }

  #turn(direction: DmaDirection = "bidirectional"): Promise<Lines> {
    return this.#run("direction", DIRECTIONS[direction]);
  }

  #run(...words: readonly (string | number)[]): Promise<Lines> {
    const done = Promise.withResolvers<Lines>();
    this.#commands.push({ text: words.join(" "), done });
    if (!this.#sending) setImmediate(() => void this.#send());
    this.#sending = true;
    return done.promise;
  }

  async #send(): Promise<void> {
    while (this.#commands.length > 0) await this.#roundTrip(this.#commands.splice(0, COMMANDS_MAX));
    this.#sending = false;
  }

  async #roundTrip(commands: readonly Command[]): Promise<void> {
    const script = RUN + commands.map(({ text }) => `c ${text}\n`).join("");
    try {
      const said = (await demand(this.#agent, script, "the self-test")).split(`${END}\n`);
      commands.forEach(({ done }, i) => {
        done.resolve(said[i]!.split("\n").map((line) => line.split(" ")));
      });
    } catch (error) {
      for (const { done } of commands) done.reject(error);
    }
  }
}

const named = (lines: Lines, name: string): Lines =>
  lines.filter((words) => words[0] === name).map((words) => words.slice(1));
const pairs = (words: readonly string[], base: number): Map<string, number> =>
  new Map(words.map((word) => word.split("=")).map(([name, n]) => [name!, Number.parseInt(n!, base)]));
const countersOf = (lines: Lines): Map<string, number> => pairs(named(lines, "counters")[0]!, 10);
const unitsOf = (lines: Lines): UnitWords[] =>
  named(lines, "units").map(
    (words) => new Map([...pairs(words, 16)].map(([gfn, word]) => [Number(gfn), word])),
  );

/** The errno and the counters must tell the same. */
function resultOf(returned: number, counters: ReadonlyMap<string, number>): string {
  const named = Object.keys(FAILURES).filter((name) => counters.has(name));
  const told = `returned ${returned}, counters ${[...counters].map(([name, n]) => `${name}=${n}`).join(" ")}`;
  if (returned === 0 && named.length === 0 && counters.get("map") === 1 && !counters.has("map_failed"))
    return "mapped";
  const [result, errno] = FAILURES[named[0] ?? ""] ?? [];
  const pin = result !== "no-unit" && result !== "saturated";
  const counted =
    counters.get("map_failed") === 1 && !counters.has("map") && counters.has("pin_refused") === pin;
  return named.length === 1 && returned === -errno! && counted ? result! : told;
}
