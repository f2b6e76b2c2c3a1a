/** Every unpin policy at work, one run each: what the replay of a recording says, seen on the machine itself. */
import { execFile } from "node:child_process";
import { promisify } from "node:util";
import { FRAME_SIZE } from "../src/base/units.ts";
import type { RunResult } from "../src/control/result.ts";
import { BIN, POLICIES, WORKLOADS } from "./policies.ts";

export interface LiveRun {
  readonly workload: string;
  readonly policy: string;
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

const OUTPUT_MAX = 2 ** 26;

/** `only`: names of WORKLOADS; empty for all. */
export async function policiesLive(
  only: readonly string[],
  say: (text: string) => void,
): Promise<LiveReport> {
  const runs: LiveRun[] = [];
  for (const [workload, args] of Object.entries(WORKLOADS)) {
    if (only.length > 0 && !only.includes(workload)) continue;
    for (const policy of POLICIES) {
      say(`${workload} under ${policy}`);
      const command = [BIN, "run", ...args, "--policy", policy, "--json", "-"];
      const { stdout } = await promisify(execFile)(process.execPath, command, { maxBuffer: OUTPUT_MAX });
      runs.push(runOf(workload, policy, JSON.parse(stdout)));
    }
  }
  return { bench: "policies-live", runs };
}

const mib = (frames: number): number => (frames * FRAME_SIZE) / 2 ** 20;

function runOf(
  workload: string,
  policy: string,
  { maps, pins, steady, dma, workload: work }: RunResult,
): LiveRun {
  return {
    ...{ workload, policy, maps: maps.map!, per1000: (1000 * pins.requests!) / maps.map! },
    steadyPer1000: steady?.maps ? (1000 * steady.pinRequests!) / steady.maps : null,
    ...{ meanMiB: mib(pins.framesMean), peakMiB: mib(pins.framesPeak), iops: work.iops },
    wrong: dma.faults + work.errors + Number(work.verified === false),
  };
}
