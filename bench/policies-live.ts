/** Every unpin policy at work, one run each: what the replay of a recording says, seen on the machine itself. */
import { execFile } from "node:child_process";
import { promisify } from "node:util";
import { FRAME_SIZE } from "../src/base/units.ts";
import type { RunResult } from "../src/control/result.ts";
import { BIN, POLICIES, SPECULATIONS, WORKLOADS } from "./policies.ts";

export interface LiveRun {
  readonly workload: string;
  readonly policy: string;
  readonly speculate: string;
  readonly maps: number;
  readonly per1000: number;
  /** After the first second. */
  readonly steadyPer1000: number | null;
  readonly meanMiB: number;
  readonly peakMiB: number;
  readonly iops: number | null;
  /** DMA faults and errors of the workload. */
  readonly wrong: number;
}
export interface LiveReport {
  readonly bench: "policies-live";
  readonly runs: readonly LiveRun[];
}

/** Enough here: a recording is 20 s, so that a replay has more to tell. */
const shorter = (arg: string): string => arg.replace("seconds=20", "seconds=6");
const OUTPUT_MAX = 2 ** 26;

/** `only`: names of WORKLOADS; empty for all. */
export async function policiesLive(
  only: readonly string[],
  say: (text: string) => void,
): Promise<LiveReport> {
  const runs: LiveRun[] = [];
  for (const [workload, args] of Object.entries(WORKLOADS)) {
    if (only.length > 0 && !only.includes(workload)) continue;
    for (const [policy, speculate] of choices()) {
      say(`${workload} under ${policy}, speculation ${speculate}`);
      const command = [
        BIN,
        "run",
        ...args.map(shorter),
        "--policy",
        policy,
        "--speculate",
        speculate,
        "--json",
        "-",
      ];
      const { stdout } = await promisify(execFile)(process.execPath, command, { maxBuffer: OUTPUT_MAX });
      runs.push({ ...runOf(JSON.parse(stdout)), workload, policy, speculate });
    }
  }
  return { bench: "policies-live", runs };
}

const mib = (frames: number): number => (frames * FRAME_SIZE) / 2 ** 20;

/** Each policy without speculation, and the default one with each. */
const choices = (): (readonly [policy: string, speculate: string])[] => [
  ...POLICIES.map((policy) => [policy, "off"] as const),
  ...SPECULATIONS.filter((s) => s !== "off").map((s) => ["lru", s] as const),
];

type Measured = Omit<LiveRun, "workload" | "policy" | "speculate">;

function runOf({ maps, pins, steady, dma, workload: work }: RunResult): Measured {
  return {
    ...{ maps: maps.map!, per1000: (1000 * pins.requests!) / maps.map! },
    steadyPer1000: steady?.maps ? (1000 * steady.pinRequests!) / steady.maps : null,
    ...{ meanMiB: mib(pins.framesMean), peakMiB: mib(pins.framesPeak), iops: work.iops },
    wrong: (dma.faults ?? 0) + work.errors + Number(work.verified === false),
  };
}
