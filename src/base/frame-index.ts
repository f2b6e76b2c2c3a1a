import { InvariantViolation } from "./errors.ts";
import type { Gfn } from "./units.ts";

const MULTIPLIER = 0x9e37_79b1; // 2^32 / golden ratio: consecutive GFNs spread over the table
/** Of the low 32 bits. */
const hash = (gfn: number) => Math.imul(gfn, MULTIPLIER);

/**
 * GFN -> dense, stable id, for structures of arrays: a set of frames that costs 16 bytes per frame held and nothing
 * per guest frame. All operations O(1); open addressing with linear probing, at most half full.
 */
export class FrameIndex {
  #gfns = new Float64Array(16);
  /** Next free id + 1, for ids that are not in use; threaded through one list. */
  #freeNext = new Int32Array(16);
  #free = 0;
  #fresh = 0;
  #size = 0;
  /** id + 1, or 0. */
  #table = new Int32Array(64);
  #shift = 32 - 6;

  get size(): number {
    return this.#size;
  }

  /** Ids are below this: the length that arrays beside this index need. */
  get capacity(): number {
    return this.#gfns.length;
  }

  /** Ids given so far are below this, in use or not. */
  get ids(): number {
    return this.#fresh;
  }

  /** -1 for an id that is not in use any more. */
  gfn(id: number): Gfn {
    return this.#gfns[id]! as Gfn;
  }

  /** The id of `gfn`, or -1. */
  find(gfn: number): number {
    const mask = this.#table.length - 1;
    for (let at = hash(gfn) >>> this.#shift; ; at = (at + 1) & mask) {
      const id = this.#table[at]! - 1;
      if (id < 0 || this.#gfns[id] === gfn) return id;
    }
  }

  /** Add a frame that is not held; returns its id. */
  insert(gfn: number): number {
    if (2 * (this.#size + 1) > this.#table.length) this.#rehash();
    let id: number;
    if (this.#free > 0) {
      id = this.#free - 1;
      this.#free = this.#freeNext[id]!;
    } else {
      id = this.#fresh++;
      if (id >= this.#gfns.length) this.#grow();
    }
    this.#gfns[id] = gfn;
    this.#place(id, gfn);
    this.#size++;
    return id;
  }

  /** Remove a frame; returns the id it had, or -1. */
  remove(gfn: number): number {
    const mask = this.#table.length - 1;
    let hole = hash(gfn) >>> this.#shift;
    for (; ; hole = (hole + 1) & mask) {
      const id = this.#table[hole]! - 1;
      if (id < 0) return -1;
      if (this.#gfns[id] === gfn) break;
    }
    const removed = this.#table[hole]! - 1;
    // Close the hole: move back every entry of the run that its home slot does not keep behind the hole.
    for (let at = (hole + 1) & mask; this.#table[at]! > 0; at = (at + 1) & mask) {
      const home = hash(this.#gfns[this.#table[at]! - 1]!) >>> this.#shift;
      if (((at - home) & mask) < ((at - hole) & mask)) continue;
      this.#table[hole] = this.#table[at]!;
      hole = at;
    }
    this.#table[hole] = 0;
    this.#gfns[removed] = -1;
    this.#freeNext[removed] = this.#free;
    this.#free = removed + 1;
    this.#size--;
    return removed;
  }

  /** Remove all. Room for many frames is given back. */
  clear(): void {
    if (this.#table.length > 8192) {
      this.#table = new Int32Array(64);
      this.#shift = 32 - 6;
      this.#gfns = new Float64Array(16);
      this.#freeNext = new Int32Array(16);
    } else this.#table.fill(0);
    this.#free = this.#fresh = this.#size = 0;
  }

  /** All frames held. The set may change while this runs: a frame removed is not visited, one added may be. */
  *[Symbol.iterator](): Generator<Gfn> {
    for (let id = 0; id < this.#fresh; id++) if (this.#gfns[id]! >= 0) yield this.#gfns[id]! as Gfn;
  }

  #place(id: number, gfn: number): void {
    const mask = this.#table.length - 1;
    for (let at = hash(gfn) >>> this.#shift; ; at = (at + 1) & mask) {
      const other = this.#table[at]! - 1;
      if (other < 0) {
        this.#table[at] = id + 1;
        return;
      }
      if (this.#gfns[other] === gfn) throw new InvariantViolation(`frame ${gfn} is inserted twice`);
    }
  }

  #rehash(): void {
    this.#table = new Int32Array(this.#table.length * 2);
    this.#shift--;
    for (let id = 0; id < this.#fresh; id++) if (this.#gfns[id]! >= 0) this.#place(id, this.#gfns[id]!);
  }

  #grow(): void {
    const gfns = new Float64Array(this.#gfns.length * 2).fill(-1);
    gfns.set(this.#gfns);
    this.#gfns = gfns;
    const next = new Int32Array(gfns.length);
    next.set(this.#freeNext);
    this.#freeNext = next;
  }
}

/** Lengthen a typed array to `capacity`, keeping its contents; arrays beside a FrameIndex grow so. */
export function grown<T extends Int32Array | Uint32Array | Float64Array | Uint8Array>(
  array: T,
  capacity: number,
): T {
  if (array.length >= capacity) return array;
  const longer = new (array.constructor as new (n: number) => T)(capacity);
  longer.set(array);
  return longer;
}
