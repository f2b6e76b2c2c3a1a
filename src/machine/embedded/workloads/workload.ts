import type { Clock } from "../../../base/clock.ts";
import type { DmaApi, PageAllocator } from "../../../driver/dma-api.ts";
import type { GuestMemory } from "../../../memory/guest-memory.ts";
import { Latencies } from "./latencies.ts";

/** What a vCPU gives its workload. */
export interface Guest {
  readonly memory: GuestMemory;
  readonly dma: DmaApi;
  readonly pages: PageAllocator;
  readonly clock: Clock;
  /** 32 bits, unsigned. The same seed, clock and device make the same accesses. */
  readonly seed: number;
}

/** Guest software that drives one device, a step at a time. */
export interface GuestWorkload {
  /** Go on, without waiting for anything. Returns whether there was something to do. */
  poll(): boolean;
  /** End the measured phase before its time. */
  stop(): void;
  /** Everything was checked, and its buffers are unmapped and freed. A device that never answers is waited for: the caller bounds that. */
  readonly finished: boolean;
  /** Of the measured phase; errors and comparisons of all phases. */
  readonly measurement: Measurement;
}

/** Can be sent between threads, and added up. */
export interface Measurement {
  ops: number;
  bytes: number;
  nanoseconds: number;
  /** Requests that the device answered with an error. */
  errors: number;
  /** Pieces of data that were compared, and how many were not what they should be. */
  compared: number;
  mismatches: number;
  /** Attempts to map that failed and were repeated. */
  mapFailures: number;
  readonly latencies: Float64Array;
}

/** Fields of `coiommu run --json`. */
export interface WorkloadReport {
  ops: number;
  iops: number;
  bytesPerSecond: number;
  latencyUs: { p50: number; p99: number } | null;
  verified: boolean | null;
  errors: number;
}

export const measurement = (latencies: Latencies): Measurement => ({
  ...{ ops: 0, bytes: 0, nanoseconds: 0, errors: 0, compared: 0, mismatches: 0, mapFailures: 0 },
  latencies: latencies.counts,
});

/** Of workloads that ran side by side. */
export function report(parts: readonly Measurement[]): WorkloadReport {
  const sum = (of: (m: Measurement) => number) => parts.reduce((total, m) => total + of(m), 0);
  const seconds = Math.max(...parts.map((m) => m.nanoseconds)) / 1e9;
  const latencies = new Latencies();
  for (const m of parts) latencies.add(m.latencies);
  const percentile = (p: number) => (latencies.percentile(p) ?? 0) / 1000;
  const ops = sum((m) => m.ops);
  return {
    ops,
    iops: seconds > 0 ? ops / seconds : 0,
    bytesPerSecond: seconds > 0 ? sum((m) => m.bytes) / seconds : 0,
    latencyUs:
      latencies.percentile(0.5) === undefined ? null : { p50: percentile(0.5), p99: percentile(0.99) },
    verified: sum((m) => m.compared) > 0 ? sum((m) => m.mismatches) === 0 : null,
    errors: sum((m) => m.errors),
  };
}
