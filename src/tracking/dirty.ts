import { FrameIndex } from "../base/frame-index.ts";
import { rangesOf } from "../base/ranges.ts";
import { FRAME_SIZE, type Gfn, gpaOf } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";

/** Frames in one slice of a harvest: what a PIN request may have to wait for. */
const SLICE_FRAMES = 1024;

/** A part of a harvest. */
export interface DirtySlice {
  /** First frame and number of frames, in pairs, ascending. */
  readonly ranges: Float64Array;
  /** False: with this slice, everything that devices wrote before the harvest began has been given. */
  readonly more: boolean;
}

/**
 * Which frames assigned devices may have written: docs/abi.md section 3, "Dirty tracking". Between start() and stop(),
 * a frame that a device writes is in a slice that is given after the write. A frame is given too often rather than not:
 * who copies it when it has its slice loses nothing.
 */
export class DirtyTracking {
  readonly #ledger: () => Iterable<Gfn>;
  /** Whether a device may have written a frame of the ledger since this was last asked for it. */
  readonly #take: (gfn: Gfn) => boolean;
  /** Dirty frames of which the ledger no longer tells. */
  readonly #left = new FrameIndex();
  #on = false;
  /** What is left of the harvest under way: the ledger first, because a frame that it loses meanwhile gets into #left. */
  #pending: Iterator<Gfn>[] = [];

  constructor(ledger: () => Iterable<Gfn>, take: (gfn: Gfn) => boolean) {
    this.#ledger = ledger;
    this.#take = take;
  }

  get on(): boolean {
    return this.#on;
  }

  /** Begin anew: what was written before this call is not told. */
  start(): void {
    this.stop();
    this.#on = true;
  }

  stop(): void {
    this.#on = false;
    this.#pending = [];
    this.#left.clear();
  }

  /** The next slice of the harvest under way, or the first of a new one. */
  harvest(framesMax = SLICE_FRAMES): DirtySlice {
    if (this.#pending.length === 0)
      this.#pending = [this.#ledger()[Symbol.iterator](), this.#left[Symbol.iterator]()];
    const dirty: number[] = [];
    for (let n = 0; n < framesMax && this.#pending.length > 0; n++) {
      const { done, value: gfn } = this.#pending[0]!.next();
      if (done) this.#pending.shift();
      else if (this.#pending.length === 1) {
        this.#left.remove(gfn);
        dirty.push(gfn);
      } else if (this.#take(gfn)) dirty.push(gfn);
    }
    const more = this.#pending.length > 0;
    if (!more && this.#left.size === 0) this.#left.clear();
    return { ranges: rangesOf(dirty), more };
  }

  /** `gfn` leaves the ledger, because nobody has it mapped. */
  leaves(gfn: Gfn): void {
    if (this.#on && this.#take(gfn)) this.remember(gfn);
  }

  /** Nothing will tell that `gfn` was written, and it may have been. */
  remember(gfn: Gfn): void {
    if (this.#on && this.#left.find(gfn) < 0) this.#left.insert(gfn);
  }

  /** Forget frames that are no longer RAM: bounds what is remembered by the guest's size. */
  memoryChanged(memory: GuestMemory): void {
    for (const gfn of this.#left) if (!memory.find(gpaOf(gfn), FRAME_SIZE)) this.#left.remove(gfn);
  }
}
