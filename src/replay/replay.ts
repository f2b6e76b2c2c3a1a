import type { Nanoseconds } from "../base/units.ts";
import { pinInBatches } from "../driver/pin-batches.ts";
import { BUFFER_RANGES } from "../driver/pin-requests.ts";
import type { TrackingUnits } from "../driver/units.ts";
import { counters, countersBuffer } from "../memory/counters.ts";
import { type IntervalChoice, PassInterval } from "../policy/pass-interval.ts";
import type { UnpinPolicy } from "../policy/policy.ts";
import type { Speculation } from "../policy/speculation/speculation.ts";
import { createIommuBuffer, SoftwareIommu } from "../tracking/software-iommu.ts";
import { TRACKING_COUNTERS, Tracker, type TrackingCounters } from "../tracking/tracker.ts";
import { VIRTIO_IOMMU_S_OK } from "../wire/virtio-iommu.ts";
import { bareGuest } from "./bare-guest.ts";
import { CountingPinner } from "./counting-pinner.ts";
import type { Trace, TraceEvent } from "./trace.ts";

export interface ReplaySettings {
  readonly policy: UnpinPolicy;
  readonly speculation: Speculation;
  readonly interval: IntervalChoice;
  /** Frames; Infinity for no limit. */
  readonly quota: number;
  /** What policies are told of the host's memory pressure, 0 to 1. */
  readonly pressure: number;
}

export interface Replayed {
  readonly maps: number;
  readonly unmaps: number;
  /** Maps that asked, with one PIN request or more. */
  readonly asks: number;
  readonly pins: Readonly<TrackingCounters>;
  /** After the first second. */
  readonly steady: { readonly maps: number; readonly pinRequests: number };
  /** Integral of the frames pinned over time, from the first event to the last. */
  readonly frameSeconds: number;
  readonly seconds: number;
}

const SECOND = 1e9;

/**
 * A guest that maps and unmaps as in a trace, over the production driver's table and the production tracking code. Passes
 * take no time. A mapping that is refused, for the quota, is left out; a real guest would try it again. All of the guest's
 * memory is there: a real speculation leaves out what the guest has never touched.
 */
export function replay(trace: Trace, settings: ReplaySettings): Replayed {
  return new Replay(trace, settings).run();
}

class Replay {
  readonly #trace: Trace;
  readonly #tracker: Tracker;
  readonly #units: TrackingUnits;
  readonly #interval: PassInterval;
  readonly #counters = counters(TRACKING_COUNTERS, countersBuffer(TRACKING_COUNTERS));
  /** Frames of mappings that were refused, how often: their unmaps are left out. */
  readonly #refused = new Map<number, number>();
  #asks = 0;
  #now = 0;
  #passDue: number;

  constructor(trace: Trace, { policy, speculation, interval, quota, pressure }: ReplaySettings) {
    this.#trace = trace;
    this.#interval = new PassInterval(interval);
    this.#passDue = this.#interval.now;
    const clock = { now: () => this.#now as Nanoseconds };
    const { memory, frames, table, units } = bareGuest(trace.framesEnd);
    this.#units = units;
    this.#tracker = new Tracker({
      ...{ memory, clock, policy, speculation, quota, pressure: () => pressure, observers: [this.#interval] },
      iommu: new SoftwareIommu(createIommuBuffer(frames), clock),
      pinner: new CountingPinner(),
      counters: this.#counters,
      beforeActivation: "none",
    });
    this.#tracker.activate(table.root, table.levels, true);
  }

  run(): Replayed {
    const { events } = this.#trace;
    const warm = { maps: 0, pinRequests: 0 };
    let maps = 0;
    for (const event of events) {
      this.#advance(event.time);
      if (event.kind === "unmap") this.#unmap(event);
      else {
        this.#map(event);
        maps++;
      }
      if (event.time < SECOND) Object.assign(warm, { maps, pinRequests: this.#counters.pinRequests });
    }
    const seconds = this.#now / SECOND;
    this.#counters.passInterval = this.#interval.now;
    this.#counters.framesCameBack = this.#interval.cameBack;
    const { frameTime, framesNow, changedAt, pinRequests } = this.#counters;
    return {
      ...{ maps, seconds },
      unmaps: events.length - maps,
      asks: this.#asks,
      pins: { ...this.#counters },
      steady: { maps: maps - warm.maps, pinRequests: pinRequests - warm.pinRequests },
      frameSeconds: (frameTime + framesNow * (this.#now - changedAt)) / SECOND,
    };
  }

  /** Passes that are due until `time`. */
  #advance(time: number): void {
    while (this.#passDue <= time) {
      this.#now = this.#passDue;
      this.#tracker.startPass();
      while (this.#tracker.slice());
      this.#interval.passEnded(this.#now as Nanoseconds, 0);
      this.#passDue = this.#now + this.#interval.now;
    }
    this.#now = time;
  }

  #map({ ranges, endpoint }: TraceEvent): void {
    let asking = false;
    for (const [first, n] of ranges) asking = this.#units.get(first, n) === "ask" || asking;
    if (!asking) return;
    this.#asks++;
    let refused = false;
    const pinned = (gfn: number) => this.#units.pinned(gfn);
    pinInBatches(ranges, BUFFER_RANGES, pinned, (batch) => {
      refused ||= this.#tracker.pin(batch, endpoint) !== VIRTIO_IOMMU_S_OK;
    });
    if (!refused) return;
    for (const [first, n] of ranges) {
      this.#units.put(first, n, false);
      for (let gfn = first; gfn < first + n; gfn++) this.#refused.set(gfn, (this.#refused.get(gfn) ?? 0) + 1);
    }
  }

  #unmap({ ranges }: TraceEvent): void {
    for (const [first, n] of ranges)
      for (let gfn = first; gfn < first + n; gfn++) {
        const refused = this.#refused.get(gfn) ?? 0;
        if (refused === 0) this.#units.put(gfn, 1);
        else this.#refused.set(gfn, refused - 1);
      }
  }
}
