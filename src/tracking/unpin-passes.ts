import type { Clock } from "../base/clock.ts";
import type { Gfn, Nanoseconds } from "../base/units.ts";
import { type Claim, GfnBuffer } from "../policy/policy.ts";
import type { TrackingCounters } from "./counters.ts";
import type { DirtyTracking } from "./dirty.ts";
import { EXTENT_FRAMES } from "./extents.ts";
import type { Pins } from "./pins.ts";
import type { TableInUse } from "./table-in-use.ts";

/** Most frames in one slice of an unpin pass: what a PIN request may have to wait for. */
const SLICE_FRAMES = 256;
const SLICE_FRAMES_MIN = 8;
/** How long a slice may take. */
export const SLICE_TIME = 200_000 as Nanoseconds;

/** What Tracker.unpinIdle() is to unpin. */
export interface IdleRange {
  /** Frames in [first, end). */
  readonly first: number;
  readonly end: number;
  /** 0, then the `next` of the slice before. */
  readonly from: number;
  /** Only frames whose memory the host has lost since they were pinned. */
  readonly discarded?: boolean;
}
export interface IdleSlice {
  readonly unpinned: number;
  /** Frames that are mapped, or that the host or a device did not let go of, or whose page goes only with its neighbours'. */
  readonly stayed: readonly Gfn[];
  /** Null when there is no more. */
  readonly next: number | null;
}

/** IdleRange.from of a walk's second part. */
const ORPHANS_FROM = 2 ** 50;

interface UnpinPassesOptions {
  readonly pins: Pins;
  readonly table: TableInUse;
  readonly dirty: DirtyTracking;
  readonly clock: Clock;
  readonly counters: TrackingCounters;
  parked(): boolean;
  /** PassLimit.pressure, as `file` says. */
  pressure(file: string): number;
}

/** Lazy unpinning, in slices: tries what the policy gives, and lets go of what the table in use does not claim. */
export class UnpinPasses {
  readonly #o: UnpinPassesOptions;
  /** When the pass under way began. */
  #at: Nanoseconds | undefined;
  #pressure = 0;
  /** Frames that it may still try: a policy that gives the same ones for ever ends it. */
  #left = 0;
  #mapped = 0;
  /** Frames in a slice, by what the last ones took. */
  #sliceFrames = SLICE_FRAMES_MIN;
  // Scratch of a slice, which may run inside a request that needs room.
  readonly #candidates = new GfnBuffer(SLICE_FRAMES);
  readonly #claimed = new GfnBuffer(SLICE_FRAMES * EXTENT_FRAMES);

  constructor(options: UnpinPassesOptions) {
    this.#o = options;
  }

  start(): void {
    const { pins, table, parked, clock, counters, pressure } = this.#o;
    if (!table.active || parked() || this.#at !== undefined) return;
    this.#at = clock.now();
    this.#left = 2 * pins.size + SLICE_FRAMES;
    this.#mapped = 0;
    const file = pins.policy.pressureFile?.();
    this.#pressure = file === undefined ? 0 : pressure(file);
    counters.passes++;
  }

  /** End the pass under way. */
  stop(): void {
    this.#at = undefined;
  }

  /** One slice of the pass under way. True while there is more. */
  slice(): boolean {
    const { pins, clock, counters, parked } = this.#o;
    if (this.#at === undefined) return false;
    if (pins.tellPolicy(SLICE_FRAMES)) {
      this.#at = clock.now(); // it begins when its policy knows all
      return true;
    }
    const more = !parked() && this.#timed(this.#at);
    if (!more) {
      this.#at = undefined;
      if (!parked()) counters.framesMapped = this.#mapped;
    }
    return more;
  }

  /** All that may go, whatever the policy would have tried: a walk that clears A, and one that unpins what was idle. */
  runAll(): void {
    const { pins, table, clock, parked } = this.#o;
    while (pins.tellPolicy(SLICE_FRAMES));
    const now = clock.now();
    for (let walk = 0; walk < 2 && table.active && !parked(); walk++) {
      // A pass that is under way finds little more to try, and ends with what this counts.
      this.#mapped = 0;
      for (let from: number | null = 0; from !== null; ) {
        this.#candidates.clear();
        from = pins.ledger.collect(0, Number.POSITIVE_INFINITY, from, SLICE_FRAMES, this.#candidates);
        this.#unpinCandidates(now, false);
      }
    }
  }

  /** One slice of Tracker.unpinIdle(): first what is in the ledger, then what is pinned beside it. Throws HostError. */
  idle({ first, end, from, discarded }: IdleRange): IdleSlice {
    const { pins, clock, parked } = this.#o;
    if (from >= ORPHANS_FROM) {
      const stayed: Gfn[] = [];
      const next = pins.collectOrphans({ first, end, discarded }, from - ORPHANS_FROM, stayed);
      return { unpinned: 0, stayed, next: next === null ? null : ORPHANS_FROM + next };
    }
    this.#candidates.clear();
    const more = pins.ledger.collect(first, end, from, SLICE_FRAMES, this.#candidates);
    if (discarded) pins.keepDiscarded(this.#candidates);
    const unpinned = parked() ? 0 : this.#unpinCandidates(clock.now(), true);
    const next = more ?? (pins.orphans > 0 ? ORPHANS_FROM : null);
    this.#candidates.keep((i) => pins.ledger.has(this.#candidates.at(i)));
    const stayed = Array.from({ length: this.#candidates.length }, (_, i) => this.#candidates.at(i));
    return { unpinned, stayed, next };
  }

  /** A slice as long as SLICE_TIME, by what the last one took for its frames. */
  #timed(now: Nanoseconds): boolean {
    const { pins, clock } = this.#o;
    if (this.#left <= 0) return false;
    const began = clock.now();
    this.#candidates.clear();
    const limit = { framesMax: Math.min(this.#sliceFrames, this.#left), pressure: this.#pressure };
    pins.policy.candidates(now, limit, this.#candidates);
    if (this.#candidates.length === 0) return false;
    this.#left -= this.#candidates.length;
    this.#unpinCandidates(now, false);
    const fit = (this.#candidates.length * SLICE_TIME) / Math.max(1, clock.now() - began);
    this.#sliceFrames = Math.max(
      SLICE_FRAMES_MIN,
      Math.min(SLICE_FRAMES, 2 * this.#sliceFrames, Math.floor(fit)),
    );
    return true;
  }

  /** Returns how many went. `accessed`: also those that were mapped lately; then it is no try of the policy's. */
  #unpinCandidates(now: Nanoseconds, accessed: boolean): number {
    const { pins, table, counters } = this.#o;
    this.#claimed.clear();
    for (let i = 0; i < this.#candidates.length; i++) {
      const gfn = this.#candidates.at(i);
      const outcome = this.#claim(gfn, accessed);
      if (outcome === "claimed") this.#claimed.push(gfn);
      else {
        if (outcome !== "gone") pins.used(gfn);
        if (accessed) continue;
        if (outcome === "mapped") this.#mapped++;
        pins.tried(gfn, outcome, now);
      }
    }
    this.#claimOthers(accessed);
    if (!accessed)
      pins.dropWaiting(this.#claimed, (gfn) => {
        table.unclaim(gfn);
        pins.tried(gfn, "refused", now);
      });
    const unpinned = pins.unpin(this.#claimed, now);
    for (let i = 0; i < this.#claimed.length; i++) table.unclaim(this.#claimed.at(i));
    counters.framesUnpinned += unpinned;
    return unpinned;
  }

  /** Claim what goes with the frames that are claimed. */
  #claimOthers(accessed: boolean): void {
    const { pins } = this.#o;
    const asked = this.#claimed.length;
    const must = pins.addOthers(this.#claimed);
    this.#claimed.keep((i) => {
      if (i < asked) return true;
      const gfn = this.#claimed.at(i);
      if (this.#claim(gfn, accessed || must) === "claimed") return true;
      pins.used(gfn);
      return false;
    });
  }

  #claim(gfn: Gfn, accessed: boolean): Claim {
    const { table, dirty } = this.#o;
    let outcome = table.claim(gfn);
    // That has cleared A.
    if (accessed && outcome === "accessed") outcome = table.claim(gfn);
    if (outcome === "claimed") dirty.leaves(gfn);
    return outcome;
  }
}
