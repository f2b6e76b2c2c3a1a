import { type Gfn, milliseconds, type Nanoseconds } from "../base/units.ts";
import { FrameQueues } from "./frame-queues.ts";
import type { Claim, UnpinPolicy } from "./policy.ts";

/** Time between unpin passes: fixed, or within bounds. */
export type IntervalChoice = Nanoseconds | { readonly min: Nanoseconds; readonly max: Nanoseconds };

export const ADAPTIVE_BOUNDS = { min: milliseconds(100), max: milliseconds(10_000) } as const;

/** Unpinned frames that are remembered. */
const GHOSTS_MAX = 65_536;
/** A frame that is asked for within so many intervals of its unpin came back soon: it should have stayed. */
const SOON = 4;
/** Of what was unpinned, the part that may come back soon; with more, the interval is too short. */
const PRICE = 0.1;
/** Of what was tried, the part that was idle; with more, there was much to find, and earlier is better. */
const MUCH = 0.1;
const STEP = 1.5;

/**
 * When the next unpin pass is due. An adaptive interval shortens after a pass that found much, and lengthens when frames
 * come back soon, which is the price of passes that follow each other too quickly. Between the two it stays.
 */
export class PassInterval implements Pick<UnpinPolicy, "pinned" | "tried"> {
  readonly #ghosts = new FrameQueues();
  #choice: IntervalChoice = ADAPTIVE_BOUNDS;
  #now = 0 as Nanoseconds;
  // Since the pass before ended.
  #tried = 0;
  #unpinned = 0;
  #cameBack = 0;
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
    // One second at first: what it is without being chosen.
    if (typeof choice === "number") this.#now = choice;
    else this.#bound(this.#now || milliseconds(1000));
  }

  pinned(gfn: Gfn, now: Nanoseconds): void {
    if (!this.#ghosts.has(gfn)) return;
    if (now - this.#ghosts.since(gfn) <= SOON * this.#now) {
      this.#cameBack++;
      this.cameBack++;
    }
    this.#ghosts.remove(gfn);
  }

  tried(gfn: Gfn, outcome: Claim, now: Nanoseconds): void {
    this.#tried++;
    if (outcome !== "claimed") return;
    this.#unpinned++;
    this.#ghosts.add(gfn, now);
    if (this.#ghosts.size() > GHOSTS_MAX) this.#ghosts.remove(this.#ghosts.oldest()!);
  }

  passEnded(): void {
    if (typeof this.#choice !== "number") {
      if (this.#cameBack > PRICE * Math.max(this.#unpinned, 1)) this.#bound(this.#now * STEP);
      else if (this.#unpinned > MUCH * this.#tried) this.#bound(this.#now / STEP);
    }
    this.#tried = this.#unpinned = this.#cameBack = 0;
  }

  #bound(ns: number): void {
    const { min, max } = this.#choice as Exclude<IntervalChoice, number>;
    this.#now = Math.round(Math.max(min, Math.min(max, ns))) as Nanoseconds;
  }
}
