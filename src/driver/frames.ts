import type { Random } from "../base/random.ts";
import type { Gpa } from "../base/units.ts";
import type { PageAllocator } from "./dma-api.ts";

/** Of eight frames, so many come from those that were given back last. */
const HOT_PICKS = 6;
/** The share of the cache that counts as used last. */
const HOT_SHARE = 16;

/**
 * Where buffers come from: a cache of frames as the guest's page cache is one. It grows to its bound as it is used,
 * a frame lies anywhere in memory, and most requests meet frames that were used a short time ago.
 */
export class FrameCache {
  readonly #pages: PageAllocator;
  readonly #next: Random;
  readonly #framesMax: number;
  readonly #hotMax: number;
  readonly #hot: Gpa[] = [];
  readonly #cold: Gpa[] = [];
  #frames = 0;

  constructor(pages: PageAllocator, framesMax: number, next: Random) {
    this.#pages = pages;
    this.#framesMax = framesMax;
    this.#hotMax = Math.ceil(framesMax / HOT_SHARE);
    this.#next = next;
  }

  /** `count` frames, contiguous only by chance, or none at all. */
  take(count: number): Gpa[] | undefined {
    const taken: Gpa[] = [];
    for (let i = 0; i < count; i++) {
      const frame = this.#pick();
      if (frame === undefined) {
        this.give(taken);
        return undefined;
      }
      taken.push(frame);
    }
    return taken;
  }

  give(frames: readonly Gpa[]): void {
    for (const frame of frames) {
      this.#hot.push(frame);
      if (this.#hot.length > this.#hotMax) this.#cold.push(this.#remove(this.#hot));
    }
  }

  /** All frames were given back. */
  close(): void {
    for (const frame of [...this.#hot, ...this.#cold]) this.#pages.free(frame, 1);
    this.#frames -= this.#hot.length + this.#cold.length;
    this.#hot.length = this.#cold.length = 0;
  }

  #pick(): Gpa | undefined {
    if (this.#hot.length > 0 && this.#next(8) < HOT_PICKS) return this.#remove(this.#hot);
    if (this.#frames < this.#framesMax) {
      const frame = this.#pages.allocate(1);
      if (frame !== undefined) {
        this.#frames++;
        return frame;
      }
    }
    if (this.#cold.length > 0) return this.#remove(this.#cold);
    return this.#hot.length > 0 ? this.#remove(this.#hot) : undefined;
  }

  #remove(from: Gpa[]): Gpa {
    const at = this.#next(from.length);
    const frame = from[at]!;
    from[at] = from.at(-1)!;
    from.pop();
    return frame;
  }
}
