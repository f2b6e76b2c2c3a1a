import type { Gfn, Nanoseconds } from "../base/units.ts";

/** What became of an attempt to unpin a frame. */
export type Claim =
  /** It was unpinned. */
  | "claimed"
  /** COUNT is not 0: it is mapped. */
  | "mapped"
  /** A was set, and is cleared now: second chance. */
  | "accessed"
  /** It is not pinned any more, for another reason. */
  | "gone"
  /** It could be unpinned, but the host or a device did not let go of it. */
  | "refused";

/** A reusable list of frames. */
export class GfnBuffer {
  readonly #gfns: Float64Array;
  #length = 0;
  constructor(capacity: number) {
    this.#gfns = new Float64Array(capacity);
  }
  get length(): number {
    return this.#length;
  }
  get full(): boolean {
    return this.#length === this.#gfns.length;
  }
  at(index: number): Gfn {
    return this.#gfns[index]! as Gfn;
  }
  push(gfn: Gfn): void {
    this.#gfns[this.#length++] = gfn;
  }
  /** Drop those for which `kept`, which is given their places, says no. */
  keep(kept: (index: number) => boolean): void {
    let length = 0;
    for (let i = 0; i < this.#length; i++) if (kept(i)) this.#gfns[length++] = this.#gfns[i]!;
    this.#length = length;
  }
  clear(): void {
    this.#length = 0;
  }
}

/**
 * Decides what is worth trying to unpin, never whether it is safe. Events and time are arguments, so that replay,
 * simulation and the live backend run the same object.
 */
export interface UnpinPolicy {
  readonly name: string;
  readonly parameters: Readonly<Record<string, number | string>>;
  /** A frame was pinned. O(1), must not throw. */
  pinned(gfn: Gfn, now: Nanoseconds): void;
  /**
   * What became of a frame that candidates() gave, or that went without having been given. O(1). A policy that took the
   * place of another ignores frames that it has not been told of yet.
   */
  tried(gfn: Gfn, outcome: Claim, now: Nanoseconds): void;
  /**
   * Append up to `framesMax` frames to try in the pass that began at `now`. Called again with the same `now` until it
   * appends none; every frame that it gave was tried() before the next call.
   */
  candidates(now: Nanoseconds, limit: { readonly framesMax: number }, out: GfnBuffer): void;
}
