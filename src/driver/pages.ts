import { FRAME_SIZE, type Gfn, type Gpa, gpaOf } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import type { PageAllocator } from "./dma-api.ts";

/** Runs of neighbours out of so many, next fit. Of one CPU: nothing is locked. */
export class RunPool {
  readonly #taken: Uint8Array;
  #next = 0;

  constructor(size: number) {
    this.#taken = new Uint8Array(size);
  }

  /** The first of `count` that are free. */
  take(count: number): number | undefined {
    const { length } = this.#taken;
    for (let tried = 0, at = this.#next; tried <= length; ) {
      if (at + count > length) {
        tried += length - at;
        at = 0;
        if (count > length) return undefined;
      }
      let run = 0;
      while (run < count && !this.#taken[at + run]) run++;
      if (run === count) {
        this.#taken.fill(1, at, at + count);
        this.#next = at + count;
        return at;
      }
      tried += run + 1;
      at += run + 1;
    }
    return undefined;
  }

  give(first: number, count: number): void {
    this.#taken.fill(0, first, first + count);
  }
}

/** Hands out the frames of one range of guest RAM. */
export class FramePool implements PageAllocator {
  readonly #memory: GuestMemory;
  readonly #first: Gfn;
  readonly #runs: RunPool;

  constructor(memory: GuestMemory, first: Gfn, frames: number) {
    this.#memory = memory;
    this.#first = first;
    this.#runs = new RunPool(frames);
  }

  allocate(frames: number): Gpa | undefined {
    const at = this.#runs.take(frames);
    if (at === undefined) return undefined;
    const gpa = gpaOf((this.#first + at) as Gfn);
    this.#memory.transfer(gpa, frames * FRAME_SIZE, (piece) => piece.fill(0));
    return gpa;
  }

  free(gpa: Gpa, frames: number): void {
    this.#runs.give(gpa / FRAME_SIZE - this.#first, frames);
  }
}
