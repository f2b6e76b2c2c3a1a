import { FRAME_SIZE, type Gfn, type Gpa, gpaOf } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import type { PageAllocator } from "./dma-api.ts";

/** Hands out the frames of one range of guest RAM, next fit. Of one CPU: nothing is locked. */
export class FramePool implements PageAllocator {
  readonly #memory: GuestMemory;
  readonly #first: Gfn;
  readonly #taken: Uint8Array;
  #next = 0;

  constructor(memory: GuestMemory, first: Gfn, frames: number) {
    this.#memory = memory;
    this.#first = first;
    this.#taken = new Uint8Array(frames);
  }

  allocate(frames: number): Gpa | undefined {
    const { length } = this.#taken;
    for (let tried = 0, at = this.#next; tried <= length; ) {
      if (at + frames > length) {
        tried += length - at;
        at = 0;
        if (frames > length) return undefined;
      }
      let run = 0;
      while (run < frames && !this.#taken[at + run]) run++;
      if (run === frames) return this.#take(at, frames);
      tried += run + 1;
      at += run + 1;
    }
    return undefined;
  }

  free(gpa: Gpa, frames: number): void {
    const at = gpa / FRAME_SIZE - this.#first;
    this.#taken.fill(0, at, at + frames);
  }

  #take(at: number, frames: number): Gpa {
    this.#taken.fill(1, at, at + frames);
    this.#next = at + frames;
    const gpa = gpaOf((this.#first + at) as Gfn);
    this.#memory.transfer(gpa, frames * FRAME_SIZE, (piece) => piece.fill(0));
    return gpa;
  }
}
