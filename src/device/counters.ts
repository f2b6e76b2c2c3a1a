import type { QueueCounters } from "./queue-runner.ts";

/** What every assigned device counts. */
export interface DeviceCounters extends QueueCounters {
  /** Data buffers moved, and their bytes. */
  transfers: number;
  bytes: number;
  /** Requests, packets or commands answered, also with an error. */
  requests: number;
}

export const DEVICE_COUNTERS = [
  "transfers",
  "bytes",
  "requests",
  "faults",
  "errors",
] as const satisfies readonly (keyof DeviceCounters)[];
