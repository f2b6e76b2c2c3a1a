import type { Clock } from "../base/clock.ts";
import type { Gfn, Nanoseconds } from "../base/units.ts";
import { type Claim, GfnBuffer } from "../policy/policy.ts";
import type { TrackingCounters } from "./counters.ts";
import type { DirtyTracking } from "./dirty.ts";
import { EXTENT_FRAMES } from "./extents.ts";
import type { Pins } from "./pins.ts";
import type { TableInUse } from "./table-in-use.ts";

/** Frames in one slice of an unpin pass: what a PIN request may have to wait for. */
const SLICE_FRAMES = 256;

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
  /** Frames that are mapped, or that the host or a device did not let go of. */
  readonly stayed: readonly Gfn[];
  /** Null when there is no more. */
  readonly next: number | null;
}

interface UnpinPassesOptions {
  readonly pins: Pins;
  readonly table: TableInUse;
  readonly dirty: DirtyTracking;
  readonly clock: Clock;
  readonly counters: TrackingCounters;
  parked(): boolean;
}

/** Lazy unpinning, in slices: tries what the policy gives, and lets go of what the table in use does not claim. */
export class UnpinPasses {
  readonly #o: UnpinPassesOptions;
  /** When the pass under way began. */
  #at: Nanoseconds | undefined;
  #mapped = 0;
  // Scratch of a slice, which may run inside a request that needs room.
  readonly #candidates = new GfnBuffer(SLICE_FRAMES);
  readonly #claimed = new GfnBuffer(SLICE_FRAMES * EXTENT_FRAMES);

  constructor(options: UnpinPassesOptions) {
    this.#o = options;
  }

  start(): void {
    const { table, parked, clock, counters } = this.#o;
    if (!table.active || parked() || this.#at !== undefined) return;
    this.#at = clock.now();
    this.#mapped = 0;
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
    const more = !parked() && this.#slice(this.#at);
    if (!more) {
      this.#at = undefined;
      if (!parked()) counters.framesMapped = this.#mapped;
    }
    return more;
  }

  /** Two whole passes at once: the first clears A, the second unpins what was idle. */
  runAll(): void {
    const { pins, table, clock, parked } = this.#o;
    while (pins.tellPolicy(SLICE_FRAMES));
    for (let pass = 0; pass < 2 && table.active && !parked(); pass++) {
      const now = clock.now();
      // A pass that is under way finds nothing more to try, and ends with what this one counts.
      this.#mapped = 0;
      while (this.#slice(now));
    }
  }

  /** One slice of Tracker.unpinIdle(). Throws HostError. */
  idle({ first, end, from, discarded }: IdleRange): IdleSlice {
    const { pins, clock, parked } = this.#o;
    this.#candidates.clear();
    const next = pins.ledger.collect(first, end, from, SLICE_FRAMES, this.#candidates);
    if (discarded) pins.keepDiscarded(this.#candidates);
    const unpinned = parked() ? 0 : this.#unpinCandidates(clock.now(), true);
    this.#candidates.keep((i) => pins.ledger.has(this.#candidates.at(i)));
    const stayed = Array.from({ length: this.#candidates.length }, (_, i) => this.#candidates.at(i));
    return { unpinned, stayed, next };
  }

  #slice(now: Nanoseconds): boolean {
    this.#candidates.clear();
    this.#o.pins.policy.candidates(now, { framesMax: SLICE_FRAMES }, this.#candidates);
    this.#unpinCandidates(now, false);
    return this.#candidates.length > 0;
  }

  /** Returns how many went. `accessed`: also those that were mapped lately; then it is no try of the policy's. */
  #unpinCandidates(now: Nanoseconds, accessed: boolean): number {
    const { pins, table, counters } = this.#o;
    this.#claimed.clear();
    for (let i = 0; i < this.#candidates.length; i++) {
      const gfn = this.#candidates.at(i);
      const outcome = this.#claim(gfn, accessed);
      if (outcome === "claimed") this.#claimed.push(gfn);
      else if (!accessed) {
        if (outcome === "mapped") this.#mapped++;
        pins.policy.tried(gfn, outcome, now);
      }
    }
    const asked = this.#claimed.length;
    pins.addDiscarded(this.#claimed);
    this.#claimed.keep((i) => i < asked || this.#claim(this.#claimed.at(i), true) === "claimed");
    const unpinned = pins.unpin(this.#claimed, now);
    for (let i = 0; i < this.#claimed.length; i++) table.unclaim(this.#claimed.at(i));
    counters.framesUnpinned += unpinned;
    return unpinned;
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
