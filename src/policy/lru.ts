import { FrameIndex, grown } from "../base/frame-index.ts";
import type { Gfn, Nanoseconds } from "../base/units.ts";
import type { Claim, GfnBuffer, UnpinPolicy } from "./policy.ts";

/** No frame. Ids are stored + 1, so that a zeroed array is an empty list. */
const NONE = 0;

/**
 * Least recently used first, as far as the A bit tells: every pass tries every frame that was pinned before it, the
 * longest untried first. A frame that was mapped since the last pass has A set, which the try clears: it is unpinned
 * by the second pass that finds it idle.
 */
export class LruPolicy implements UnpinPolicy {
  readonly name = "lru";
  readonly parameters = {};
  readonly #frames = new FrameIndex();
  #next = new Int32Array(0);
  #previous = new Int32Array(0);
  #touched = new Float64Array(0);
  #oldest = NONE;
  #newest = NONE;

  pinned(gfn: Gfn, now: Nanoseconds): void {
    if (this.#frames.find(gfn) >= 0) return;
    const id = this.#frames.insert(gfn);
    this.#next = grown(this.#next, this.#frames.capacity);
    this.#previous = grown(this.#previous, this.#frames.capacity);
    this.#touched = grown(this.#touched, this.#frames.capacity);
    this.#append(id, now);
  }

  tried(gfn: Gfn, outcome: Claim, now: Nanoseconds): void {
    const id = this.#frames.find(gfn);
    if (id < 0) return;
    this.#unlink(id);
    if (outcome === "claimed" || outcome === "gone") this.#frames.remove(gfn);
    else this.#append(id, now);
  }

  candidates(now: Nanoseconds, limit: { readonly framesMax: number }, out: GfnBuffer): void {
    let link = this.#oldest;
    for (let n = 0; n < limit.framesMax && link !== NONE && this.#touched[link - 1]! < now; n++) {
      out.push(this.#frames.gfn(link - 1));
      link = this.#next[link - 1]!;
    }
  }

  #append(id: number, now: Nanoseconds): void {
    this.#touched[id] = now;
    this.#next[id] = NONE;
    this.#previous[id] = this.#newest;
    if (this.#newest === NONE) this.#oldest = id + 1;
    else this.#next[this.#newest - 1] = id + 1;
    this.#newest = id + 1;
  }

  #unlink(id: number): void {
    const next = this.#next[id]!;
    const previous = this.#previous[id]!;
    if (previous === NONE) this.#oldest = next;
    else this.#next[previous - 1] = next;
    if (next === NONE) this.#newest = previous;
    else this.#previous[next - 1] = previous;
  }
}
