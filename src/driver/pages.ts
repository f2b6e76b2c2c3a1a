import { FRAME_SIZE, type Gfn, type Gpa, gpaOf } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import type { PageAllocator } from "./dma-api.ts";

/** Runs of neighbours out of `size` from `first` on, next fit. Of one CPU: nothing is locked. */
export class RunPool {
  readonly #first: number;
  readonly #taken: Uint8Array;
  #next = 0;

  constructor(first: number, size: number) {
    this.#first = first;
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
        return this.#first + at;
      }
      tried += run + 1;
      at += run + 1;
    }
    return undefined;
  }

  /** Never hand out these, of which some may not be in the pool. */
  keep(first: number, count: number): void {
    const at = first - this.#first;
    this.#taken.fill(1, Math.max(0, at), Math.max(0, at + count));
  }

  give(first: number, count: number): void {
    const at = first - this.#first;
    this.#taken.fill(0, at, at + count);
  }
}

/** Hands out the frames of RAM of one range of the guest's addresses. */
export class FramePool implements PageAllocator {
  readonly #memory: GuestMemory;
  readonly #runs: RunPool;

  constructor(memory: GuestMemory, first: Gfn, frames: number) {
    this.#memory = memory;
    this.#runs = new RunPool(first, frames);
    let end = 0;
    for (const { gpa, size } of memory.regions) {
      this.#runs.keep(end, gpa / FRAME_SIZE - end);
      end = (gpa + size) / FRAME_SIZE;
    }
    if (end < first + frames) this.#runs.keep(end, first + frames - end);
  }

  allocate(frames: number): Gpa | undefined {
    const first = this.#runs.take(frames);
    if (first === undefined) return undefined;
    const gpa = gpaOf(first as Gfn);
    this.#memory.transfer(gpa, frames * FRAME_SIZE, (piece) => piece.fill(0));
    return gpa;
  }

  free(gpa: Gpa, frames: number): void {
    this.#runs.give(gpa / FRAME_SIZE, frames);
  }
}
