import type { Gfn, Nanoseconds } from "../base/units.ts";
import type { Parameters, Values, ValuesOf } from "./parameters.ts";

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
  /** It could be unpinned, but the host or a device did not let go of it, or it is pinned with others that are in use. */
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
    return this.room === 0;
  }
  get room(): number {
    return this.#gfns.length - this.#length;
  }
  at(index: number): Gfn {
    return this.#gfns[index]! as Gfn;
  }
  /** Throws RangeError when it is full. */
  push(gfn: Gfn): void {
    if (this.#length === this.#gfns.length)
      throw new RangeError(`no room for more than ${this.#length} frames`);
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

/** What a policy is asked for. */
export interface PassLimit {
  readonly framesMax: number;
  /** Share of the last 10 s in which tasks of the host waited for memory, 0 to 1; 0 where nobody looks. */
  readonly pressure: number;
}

/**
 * Decides what is worth trying to unpin, never whether it is safe. Events and time are arguments, so that replay,
 * simulation and the live backend run the same object.
 */
export interface UnpinPolicy {
  readonly name: string;
  readonly parameters: Values;
  /** What it has learnt, for people: names and numbers. */
  state?(): Readonly<Record<string, number>>;
  /** The file, of the form of /proc/pressure/memory, that PassLimit.pressure is read from before each pass; none: 0. */
  pressureFile?(): string | undefined;
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
  candidates(now: Nanoseconds, limit: PassLimit, out: GfnBuffer): void;
}

/** A kind of policy: what `coiommu policies` lists, and what a file of `--policy ./mine.ts` exports by default. */
export interface PolicyEntry<P extends Parameters = Parameters> {
  readonly name: string;
  readonly summary: string;
  /** Where the idea comes from. */
  readonly source: string;
  readonly parameters: P;
  /** `values`: to be read when they are needed, because an operator may change them. */
  create(values: ValuesOf<P>): Omit<UnpinPolicy, "name" | "parameters">;
}

/** Types `create` by the parameters. */
export const definePolicy = <const P extends Parameters>(entry: PolicyEntry<P>): PolicyEntry<P> => entry;

/** Whether a frame that was tried is not pinned any more. */
export const isGone = (outcome: Claim): boolean => outcome === "claimed" || outcome === "gone";
