import { type Gfn, milliseconds, type Nanoseconds } from "../base/units.ts";
import { FrameQueues } from "./frame-queues.ts";
import type { Claim, UnpinPolicy } from "./policy.ts";

/** Time between unpin passes: fixed, or within bounds. */
export type IntervalChoice = Nanoseconds | { readonly min: Nanoseconds; readonly max: Nanoseconds };

export const ADAPTIVE_BOUNDS = { min: milliseconds(100), max: milliseconds(10_000) } as const;

/** Unpinned frames that are remembered. */
const GHOSTS_MAX = 65_536;
/**
 * Requests for frames that came back soon, in a second: with more the interval is too short, with less than half of it a
 * shorter one may be tried. An exit costs the guest some 10 us, so this is far below 0.1 % of a CPU.
 */
const PRICE = 20;
/** Of what was tried, the part that was idle; with more, there was much to find, and earlier is better. */
const MUCH = 0.1;
/** Of the backend's time, what passes may take. */
const SHARE = 0.1;
const STEP = 1.5;
/** To where an interval goes back by and by while passes find little: what it is at first. */
const REST = milliseconds(300);
const DRIFT = 1.02;

/**
 * When the next unpin pass is due. An adaptive interval shortens after a pass that found much, and lengthens while frames
 * that come back soon make the guest leave too often, or when passes take too much of the backend's time.
 *
 * Soon is within an interval of the unpin. An unpinned frame had been idle for one or two of them: if it stays away for as
 * long again, to keep it would have cost as much as was lost on it, as with skis that one rents or buys (Karlin et al.,
 * Competitive Snoopy Caching, 1988); if it comes back earlier, it should have stayed.
 */
export class PassInterval implements Pick<UnpinPolicy, "pinned" | "tried"> {
  readonly #ghosts = new FrameQueues();
  #choice: IntervalChoice = ADAPTIVE_BOUNDS;
  #now = 0 as Nanoseconds;
  // Since the pass before ended.
  #tried = 0;
  #unpinned = 0;
  #requests = 0;
  #ended = 0;
  /** When the last of those requests was. */
  #requested = Number.NaN;
  /** Frames that came back soon, in all. */
  cameBack = 0;

  constructor(choice: IntervalChoice) {
    this.choose(choice);
  }

  get choice(): IntervalChoice {
    return this.#choice;
  }
  get now(): Nanoseconds {
    return this.#now;
  }

  /** An adaptive one goes on from where it is, as far as the bounds let it. */
  choose(choice: IntervalChoice): void {
    this.#choice = choice;
    if (typeof choice === "number") this.#now = choice;
    else this.#bound(this.#now || REST);
  }

  /** `unasked`: without a request, which would be the price. */
  pinned(gfn: Gfn, now: Nanoseconds, unasked = false): void {
    if (unasked || !this.#ghosts.has(gfn)) return;
    if (now - this.#ghosts.since(gfn) <= this.#now) {
      this.cameBack++;
      // All frames of a request are pinned at one moment.
      if (now !== this.#requested) this.#requests++;
      this.#requested = now;
    }
    this.#ghosts.remove(gfn);
  }

  /** The guest has not asked for it: it was pinned. */
  used(gfn: Gfn): void {
    this.#ghosts.remove(gfn);
  }

  tried(gfn: Gfn, outcome: Claim, now: Nanoseconds): void {
    this.#tried++;
    if (outcome !== "claimed") return;
    this.#unpinned++;
    this.#ghosts.add(gfn, now);
    if (this.#ghosts.size() > GHOSTS_MAX) this.#ghosts.remove(this.#ghosts.oldest()!);
  }

  /** `took`: time spent in its slices. */
  passEnded(now: Nanoseconds, took: number): void {
    const perSecond = (1e9 * this.#requests) / Math.max(1, now - this.#ended);
    if (typeof this.#choice !== "number") {
      if (perSecond > PRICE || took > SHARE * this.#now) this.#bound(this.#now * STEP);
      else if (this.#unpinned <= MUCH * this.#tried)
        this.#bound(Math.max(this.#now, Math.min(REST, this.#now * DRIFT)));
      else if (perSecond < PRICE / 2) this.#bound(this.#now / STEP);
    }
    this.#tried = this.#unpinned = this.#requests = 0;
    this.#ended = now;
  }

  #bound(ns: number): void {
    const { min, max } = this.#choice as Exclude<IntervalChoice, number>;
    this.#now = Math.round(Math.max(min, Math.min(max, ns))) as Nanoseconds;
  }
}
