import type { Nanoseconds } from "../base/units.ts";
import type { Counters } from "../memory/counters.ts";
import type { Pinner } from "./pinner.ts";

/** What is so now, for observers, who never ask the backend. */
export const TRACKING_STATE = [
  /** Index in LIVES. */
  "life",
  /** How often the guest has parked unpinning. */
  "parks",
  /** 1 while the operator has. */
  "parkedByOperator",
  /** Frames; Infinity for no limit. */
  "quota",
  /** While all RAM is pinned in the background: frames of it, how many are pinned, and an index in STOPPED_BY. */
  "backgroundFrames",
  "backgroundPinned",
  "backgroundStopped",
  /** Frames of framesNow that the guest has asked for. */
  "framesClaimed",
  /** Time between unpin passes, in ns. */
  "passInterval",
  /** 1 while speculation has switched itself off; frames that it was judged by since it was chosen, and of the last of them those used. */
  "speculationStopped",
  "speculationJudged",
  "speculationUsed",
  /** 1 once a function was assigned whose DMA no gate of ours sees. */
  "dmaUnseen",
  /** Of framesNow, those that are pinned only because others are. */
  "framesBeyondNeed",
  /** Mappings of an IOMMU, and how many there may be: Infinity without a limit, 0 without an IOMMU. */
  "mappings",
  "mappingsLeft",
  "mappingsMax",
] as const;

export const TRACKING_COUNTERS = [
  "pinRequests",
  "pinRequestsRefused",
  "framesPinned",
  "framesUnpinned",
  "framesFirmware",
  "framesFaulted",
  /** Pinned unasked; of them, those that the guest has used since, and those that were unpinned before it did. */
  "framesSpeculative",
  "speculationSaved",
  "speculationWasted",
  "framesNow",
  "framesPeak",
  /** Integral of framesNow over time, in frame-nanoseconds, up to `changedAt`. */
  "frameTime",
  "changedAt",
  "startedAt",
  "framesBeyondNeedPeak",
  "mappingsPeak",
  "kernelPagesPeak",
  "passes",
  /** Frames that were unpinned, and asked for again within an interval between passes. */
  "framesCameBack",
  /** Frames that the last complete pass found mapped. */
  "framesMapped",
  /** DMA faults of assigned devices that were written to the guest's event queue, and all others. */
  "faultsReported",
  "faultsDropped",
  ...TRACKING_STATE,
] as const;
export type TrackingCounters = Counters<(typeof TRACKING_COUNTERS)[number]>;

/** From `now` on, `pinned` frames are. */
export function countPinned(counters: TrackingCounters, pinned: number, now: Nanoseconds): void {
  counters.frameTime += counters.framesNow * (now - counters.changedAt);
  counters.changedAt = now;
  counters.framesNow = pinned;
  counters.framesPeak = Math.max(counters.framesPeak, pinned);
}

/** What an IOMMU has now. */
export function countMappings(
  counters: TrackingCounters,
  { pinsNow = 0, pinsMax = Number.POSITIVE_INFINITY, pinsLeft = pinsMax }: Pinner,
  beyondNeed: number,
): void {
  counters.mappings = pinsNow;
  counters.mappingsMax = pinsMax;
  counters.mappingsLeft = pinsLeft;
  counters.mappingsPeak = Math.max(counters.mappingsPeak, pinsNow);
  counters.framesBeyondNeed = beyondNeed;
  counters.framesBeyondNeedPeak = Math.max(counters.framesBeyondNeedPeak, beyondNeed);
}

/** Frames pinned since the beginning, on average over time. */
export const meanPinned = (c: TrackingCounters, now: Nanoseconds): number =>
  (c.frameTime + c.framesNow * (now - c.changedAt)) / (now - c.startedAt);
