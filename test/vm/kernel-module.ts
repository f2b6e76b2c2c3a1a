/** The kernel module in a running guest as a driver under test, through the debugfs file of its self-test. */
import { invariant } from "../../src/base/errors.ts";
import { demand } from "../../src/control/guest-side.ts";
import type { GuestAgent } from "../../src/machine/qemu/agent.ts";
import type {
  DriverUnderTest,
  HostAnswer,
  MapOutcome,
  SeenRequest,
  UnitWords,
} from "../support/run-driver-case.ts";
import { type Buffers, touched } from "../vectors/driver-case.ts";

const FUNCTION = `f=/sys/kernel/debug/coiommu/selftest
c() { exec 3<>$f && echo "$*" >&3 && while read -r l <&3; do echo "$l"; done; s=$?; exec 3>&-; [ $s = 0 ] || { echo "failed: $*"; exit 1; } }
`;

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

/** What a mapping or an unmapping has said. */
interface Report {
  readonly requests: readonly SeenRequest[];
  readonly returned: number;
  readonly counters: ReadonlyMap<string, number>;
  readonly units: UnitWords;
}

export class KernelModule implements DriverUnderTest {
  readonly #agent: GuestAgent;
  /** Sent with the next command that has something to say: a command costs a round trip. */
  #pending: string[] = [];
  #units: UnitWords = new Map();

  constructor(agent: GuestAgent) {
    this.#agent = agent;
  }

  reset(batchMax: number, frames: readonly number[]): void {
    this.#pending = [`reset ${batchMax}`, `watch ${frames.join(" ")}`];
  }

  setUnit(gfn: number, word: number): void {
    this.#pending.push(`set ${gfn} ${word}`);
  }

  units(): UnitWords {
    return this.#units;
  }

  late(pins: readonly number[]): void {
    this.#pending.push(`late ${pins.join(" ")}`);
  }

  device(on: boolean): void {
    this.#pending.push(`device ${on ? "on" : "off"}`);
  }

  async map(buffers: Buffers, host: readonly HostAnswer[]): Promise<MapOutcome> {
    for (const { pins, reply } of host)
      this.#pending.push(
        reply === "silence" ? "silence" : `answer ${reply.written} ${reply.status} ${pins.join(" ")}`,
      );
    const { requests, returned, counters } = await this.#run("map", buffers);
    return { requests, result: resultOf(returned, counters) };
  }

  async unmap(buffers: Buffers): Promise<number> {
    const { counters } = await this.#run("unmap", buffers);
    const done = counters.get("frames_unmapped") ?? 0;
    const refused = counters.get("underflow") ?? 0;
    invariant(done + refused === touched(buffers).length, "a frame is neither counted down nor reported");
    return done;
  }

  async #run(what: "map" | "unmap", { kind, pieces }: Buffers): Promise<Report> {
    this.#pending.push(`${what}_${kind} ${pieces.flat().join(" ")}`, "units");
    const script = FUNCTION + this.#pending.map((command) => `c ${command}`).join("\n");
    this.#pending = [];
    const report = parseReport(await demand(this.#agent, script, "a command of the self-test"));
    this.#units = report.units;
    return report;
  }
}

function parseReport(text: string): Report {
  const lines = text
    .trim()
    .split("\n")
    .map((line) => line.split(" "));
  const all = (name: string) => lines.filter((words) => words[0] === name).map((words) => words.slice(1));
  const units = all("units").map(
    (words) =>
      new Map(words.map((w) => w.split("=")).map(([gfn, word]) => [Number(gfn), Number.parseInt(word!, 16)])),
  );
  return {
    requests: all("request").map(([bytes], i) => ({ bytes: Buffer.from(bytes!, "hex"), units: units[i]! })),
    returned: Number(all("returned")[0]![0]),
    counters: new Map(
      all("counters")[0]!
        .map((w) => w.split("="))
        .map(([name, n]) => [name!, Number(n)]),
    ),
    units: units.at(-1)!,
  };
}

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
