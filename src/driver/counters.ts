import type { Counters } from "../memory/counters.ts";

/** What a CPU's driver counts. Names and meanings are those of guest/linux/coiommu.h. */
export const DRIVER_COUNTERS = [
  /** Mapping operations that succeeded, and their frames. */
  "map",
  "unmap",
  "framesMapped",
  "framesUnmapped",
  "mapFailed",
  "saturated",
  "noUnit",
  /** Mappings that failed because PIN did not succeed. */
  "pinRefused",
  "pinRequests",
  /** Frames in requests that were answered OK. */
  "pinFrames",
  /** Answered OK, but a frame lacked P. */
  "pinNotSeen",
  /** No answer in time. */
  "pinLost",
  /** No device that answers. */
  "pinOff",
  /** Unmap of a frame with COUNT 0: a bug of the caller's. */
  "underflow",
  /** Of domains. */
  "mapRequests",
  "unmapRequests",
  /** Notifications: what leaves the guest for requests. */
  "kicks",
  /** Addresses that were not taken back from the device, and so are out of use. */
  "unmapFailed",
  "alloc",
  "free",
  "sync",
  /** DMA faults that the device reported, and events that are no such report. */
  "faults",
  "badEvents",
] as const;
export type DriverCounters = Counters<(typeof DRIVER_COUNTERS)[number]>;
