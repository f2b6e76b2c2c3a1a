/**
 * Every unpin policy over recorded runs, by the production tracking code: what it has pinned against how often the guest
 * has to leave, beside what no policy can beat.
 */
import { execFile } from "node:child_process";
import { existsSync, mkdirSync } from "node:fs";
import path from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { FRAME_SIZE, milliseconds } from "../src/base/units.ts";
import { ADAPTIVE_BOUNDS, type IntervalChoice } from "../src/policy/pass-interval.ts";
import { createPolicy } from "../src/policy/registry.ts";
import { createSpeculation } from "../src/policy/speculation/registry.ts";
import { Optimal } from "../src/replay/optimal.ts";
import { replay } from "../src/replay/replay.ts";
import { readTrace, type Trace } from "../src/replay/trace.ts";

export const BIN = fileURLToPath(new URL("../bin/coiommu.js", import.meta.url));

/** What is recorded, on which machine, with which memory. */
export const WORKLOADS: Readonly<Record<string, readonly string[]>> = {
  "fio-randread": ["--machine", "embedded", "--workload", "fio:rw=randread,bs=4k,iodepth=32,seconds=20"],
  "fio-randwrite": ["--machine", "embedded", "--workload", "fio:rw=randwrite,bs=4k,iodepth=32,seconds=20"],
  "fio-read": ["--machine", "embedded", "--workload", "fio:rw=read,bs=128k,iodepth=8,seconds=20"],
  "nic-recycled": ["--machine", "embedded", "--workload", "nic:mode=recycled,traffic=receive,seconds=20"],
  "nic-fresh": ["--machine", "embedded", "--workload", "nic:mode=fresh,traffic=receive,seconds=20"],
  "nic-loopback": ["--machine", "embedded", "--workload", "nic:mode=fresh,traffic=loopback,seconds=20"],
  gpu: ["--machine", "embedded", "--workload", "gpu:seconds=20"],
  "vm-fio-randread": ["--machine", "qemu", "--workload", "fio:rw=randread,bs=4k,iodepth=32,seconds=20"],
  "vm-fio-randwrite": ["--machine", "qemu", "--workload", "fio:rw=randwrite,bs=4k,iodepth=32,seconds=20"],
  "vm-build": ["--machine", "qemu", "--workload", "script:examples/workloads/build.sh"],
};

const INTERVALS: Readonly<Record<string, IntervalChoice>> = {
  "100ms": milliseconds(100),
  "300ms": milliseconds(300),
  "1s": milliseconds(1000),
  "3s": milliseconds(3000),
  adaptive: ADAPTIVE_BOUNDS,
};
export const SPECULATIONS = ["off", "ghost", "neighbours", "stride"] as const;
export const POLICIES = ["lru", "generations", "clock", "working-set", "off"] as const;

export interface Point {
  readonly policy: string;
  readonly speculate: string;
  readonly interval: string;
  readonly maps: number;
  readonly requests: number;
  readonly per1000: number;
  readonly asksPer1000: number;
  /** After the first second. */
  readonly steadyPer1000: number | null;
  readonly meanMiB: number;
  readonly peakMiB: number;
  /** Frames pinned unasked that were used, and that were not; whether the speculation stopped itself. */
  readonly saved: number;
  readonly wasted: number;
  readonly stopped: boolean;
  /** Pinned frame-seconds over the least that is possible with as many mappings that ask. */
  readonly ofOptimal: number | null;
}

export interface PolicyWorkload {
  readonly name: string;
  readonly workload: string;
  readonly events: number;
  readonly seconds: number;
  readonly points: readonly Point[];
  /** [mappings that ask per 1,000, mean MiB]: the least that is possible. */
  readonly optimal: readonly (readonly [per1000: number, meanMiB: number])[];
}

export interface PoliciesReport {
  readonly bench: "policies";
  readonly workloads: readonly PolicyWorkload[];
}

/** Record what `folder` does not have yet, and replay all of it. `only`: names of WORKLOADS; empty for all. */
export async function policies(
  folder: string,
  only: readonly string[],
  say: (text: string) => void,
): Promise<PoliciesReport> {
  mkdirSync(folder, { recursive: true });
  const workloads: PolicyWorkload[] = [];
  for (const [name, args] of Object.entries(WORKLOADS)) {
    if (only.length > 0 && !only.includes(name)) continue;
    const log = path.join(folder, `${name}.log`);
    if (!existsSync(log)) {
      say(`${name}: recording`);
      await promisify(execFile)(process.execPath, [BIN, "run", ...args, "--record", log]);
    }
    say(`${name}: replaying`);
    workloads.push(measure(name, await readTrace(log)));
  }
  return { bench: "policies", workloads };
}

function measure(name: string, trace: Trace): PolicyWorkload {
  const optimal = new Optimal(trace);
  const points = POLICIES.flatMap((policy) =>
    Object.entries(INTERVALS)
      .filter(([, choice]) => policy !== "off" || choice === ADAPTIVE_BOUNDS)
      .flatMap(([interval, choice]) =>
        // Speculations at the default interval.
        SPECULATIONS.filter((speculate) => speculate === "off" || choice === ADAPTIVE_BOUNDS).map(
          (speculate) => pointOf(trace, optimal, { policy, speculate, interval, choice }),
        ),
      ),
  );
  const maps = trace.events.filter(({ kind }) => kind === "map").length;
  const seconds = trace.events.at(-1)!.time / 1e9;
  return {
    ...{ name, workload: trace.header.workload, events: trace.events.length, seconds, points },
    optimal: optimal
      .curve(200)
      .map(([asks, frameSeconds]) => [(1000 * asks) / maps, mib(frameSeconds / seconds)]),
  };
}

interface Setting {
  readonly policy: string;
  readonly speculate: string;
  readonly interval: string;
  readonly choice: IntervalChoice;
}

function pointOf(trace: Trace, optimal: Optimal, { policy, speculate, interval, choice }: Setting): Point {
  const settings = {
    ...{ policy: createPolicy(policy), speculation: createSpeculation(speculate), interval: choice },
    ...{ quota: Number.POSITIVE_INFINITY, pressure: 0 },
  };
  const { pins, maps, asks, steady, frameSeconds, seconds } = replay(trace, settings);
  const least = optimal.frameSeconds(asks);
  return {
    ...{ policy, speculate, interval, maps, requests: pins.pinRequests },
    per1000: (1000 * pins.pinRequests) / maps,
    asksPer1000: (1000 * asks) / maps,
    steadyPer1000: steady.maps > 0 ? (1000 * steady.pinRequests) / steady.maps : null,
    ...{ meanMiB: mib(frameSeconds / seconds), peakMiB: mib(pins.framesPeak) },
    ...{
      saved: pins.speculationSaved,
      wasted: pins.speculationWasted,
      stopped: pins.speculationStopped === 1,
    },
    ofOptimal: least ? frameSeconds / least : null,
  };
}

const mib = (frames: number): number => (frames * FRAME_SIZE) / 2 ** 20;
