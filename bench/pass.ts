/**
 * An unpin pass over a large ledger in which nothing is idle: how long a PIN request that comes at any moment waits for
 * the slice that is under way, and how long it takes, with passes and without.
 */
import { monotonicClock } from "../src/host/clock.ts";
import { SoftwarePinner } from "../src/host/software-pinner.ts";
import { counters, countersBuffer } from "../src/memory/counters.ts";
import { createPolicy } from "../src/policy/registry.ts";
import { bareGuest } from "../src/replay/bare-guest.ts";
import { createIommuBuffer, SoftwareIommu } from "../src/tracking/software-iommu.ts";
import { TRACKING_COUNTERS, Tracker } from "../src/tracking/tracker.ts";
import { SLICE_TIME } from "../src/tracking/unpin-passes.ts";

/** Frames in the ledger. */
const FRAMES = 2 ** 20;
/** Frames that PIN requests ask for between slices; they are pinned already, as most of a request's frames are. */
const REQUEST_FRAMES = 32;

/** In microseconds. */
export interface Distribution {
  readonly p50: number;
  readonly p99: number;
  readonly p999: number;
  readonly max: number;
}

/** The share that took at most so long. */
export type Curve = readonly (readonly [us: number, share: number])[];

export interface PassReport {
  readonly bench: "pass";
  readonly rounds: number;
  readonly frames: number;
  readonly limitUs: number;
  /** A slice of the pass: what a request waits for at most. */
  readonly slice: Distribution;
  /** A loop of arithmetic that takes as long as a slice: what the machine does to anything. */
  readonly reference: Distribution;
  /** Shares that took longer than the limit. */
  readonly overLimit: { readonly slice: number; readonly reference: number };
  /** A PIN request between slices, and where there is no pass. */
  readonly request: { readonly duringPass: Distribution; readonly alone: Distribution };
  /** Whole passes, ms. */
  readonly passMs: { readonly min: number; readonly median: number; readonly max: number };
  readonly curves: { readonly slice: Curve; readonly reference: Curve };
}

export function pass(rounds: number): PassReport {
  const { tracker } = busyGuest();
  const loopsPerNs = calibrate();
  const slices: number[] = [];
  const references: number[] = [];
  const during: number[] = [];
  const alone: number[] = [];
  const passes: number[] = [];
  for (let round = -2; round < rounds; round++) {
    let [requests, took] = [0, 0];
    tracker.startPass();
    for (let more = true; more; ) {
      const start = monotonicClock.now();
      more = tracker.slice();
      const sliced = monotonicClock.now();
      took += sliced - start;
      tracker.pin([{ gfn: (requests++ * REQUEST_FRAMES) % FRAMES, nrFrames: REQUEST_FRAMES }]);
      const pinned = monotonicClock.now();
      spin(sliced - start, loopsPerNs);
      if (round < 0) continue;
      slices.push((sliced - start) / 1000);
      during.push((pinned - sliced) / 1000);
      references.push((monotonicClock.now() - pinned) / 1000);
    }
    if (round < 0) continue;
    passes.push(took / 1e6);
    for (let i = 0; i < requests; i++) {
      const start = monotonicClock.now();
      tracker.pin([{ gfn: (i * REQUEST_FRAMES) % FRAMES, nrFrames: REQUEST_FRAMES }]);
      alone.push((monotonicClock.now() - start) / 1000);
    }
  }
  const limitUs = SLICE_TIME / 1000;
  const over = (times: readonly number[]) => times.filter((us) => us > limitUs).length / times.length;
  const sorted = passes.toSorted((a, b) => a - b);
  return {
    ...{ bench: "pass", rounds, frames: FRAMES, limitUs },
    overLimit: { slice: over(slices), reference: over(references) },
    ...{ slice: distribution(slices), reference: distribution(references) },
    request: { duringPass: distribution(during), alone: distribution(alone) },
    passMs: { min: sorted[0]!, median: sorted[sorted.length >> 1]!, max: sorted.at(-1)! },
    curves: { slice: curveOf(slices), reference: curveOf(references) },
  };
}

/** All of its frames are mapped, and so pinned. */
function busyGuest() {
  const { memory, frames, table, units } = bareGuest(FRAMES);
  const tracker = new Tracker({
    ...{ memory, clock: monotonicClock, policy: createPolicy("lru"), quota: Number.POSITIVE_INFINITY },
    iommu: new SoftwareIommu(createIommuBuffer(frames), monotonicClock),
    pinner: new SoftwarePinner(),
    counters: counters(TRACKING_COUNTERS, countersBuffer(TRACKING_COUNTERS)),
    beforeActivation: "none",
  });
  tracker.activate(table.root, table.levels, true);
  for (let gfn = 0; gfn < FRAMES; gfn += 512) {
    units.get(gfn, 512);
    tracker.pin([{ gfn, nrFrames: 512 }]);
  }
  if (tracker.pinned !== FRAMES) throw new Error(`${tracker.pinned} frames are pinned`);
  return { tracker };
}

let sink = 0;
function arithmetic(loops: number): void {
  for (let i = 0; i < loops; i++) sink = (Math.imul(sink, 0x9e37_79b1) + i) | 0;
}
const spin = (ns: number, loopsPerNs: number): void =>
  arithmetic(Math.round(Math.min(ns, SLICE_TIME) * loopsPerNs));

/** Loops of arithmetic() in a nanosecond, on the best of some days. */
function calibrate(): number {
  const loops = 1e6;
  const times = Array.from({ length: 20 }, () => {
    const start = monotonicClock.now();
    arithmetic(loops);
    return monotonicClock.now() - start;
  });
  return loops / Math.min(...times);
}

function distribution(values: readonly number[]): Distribution {
  const sorted = values.toSorted((a, b) => a - b);
  const at = (share: number) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))]!;
  return { p50: at(0.5), p99: at(0.99), p999: at(0.999), max: sorted.at(-1)! };
}

function curveOf(values: readonly number[]): Curve {
  const sorted = values.toSorted((a, b) => a - b);
  const shares = Array.from({ length: 400 }, (_, i) => 1 - 10 ** (-i / 80));
  return [...new Set(shares.map((share) => Math.floor(share * (sorted.length - 1))))].map((i) => [
    sorted[i]!,
    (i + 1) / sorted.length,
  ]);
}
