import { InvariantViolation, invariant } from "../base/errors.ts";

const GROUP_SHIFT = 14;
const WORD_SHIFT = 5;
const WORDS_PER_GROUP = 1 << (GROUP_SHIFT - WORD_SHIFT);
/** Slots by which a table grows. */
export const SLOTS_PER_GROUP = 1 << GROUP_SHIFT;

/**
 * Which slots are taken: one bit each, and per group the number of free ones. Taken next-fit in ascending order, so
 * that those taken together are neighbours where that is possible at all, whatever order they were given back in.
 */
export class SlotTable {
  readonly #taken: Int32Array;
  readonly #freeIn: Int32Array;
  #groups = 0;
  #free = 0;
  #cursor = 0;

  /** 2 KiB per possible group, which the system provides when they are first written. */
  constructor(groupsMax: number) {
    this.#taken = new Int32Array(groupsMax * WORDS_PER_GROUP);
    this.#freeIn = new Int32Array(groupsMax);
  }

  get free(): number {
    return this.#free;
  }
  get groups(): number {
    return this.#groups;
  }

  /** Add a group of free slots, numbered after those there are. False when there may be no more. */
  grow(): boolean {
    if (this.#groups === this.#freeIn.length) return false;
    this.#cursor = this.#groups * WORDS_PER_GROUP;
    this.#freeIn[this.#groups++] = SLOTS_PER_GROUP;
    this.#free += SLOTS_PER_GROUP;
    return true;
  }

  /** Take `count` slots, at most `free`, into out[0..count-1]. */
  take(count: number, out: Int32Array): void {
    invariant(count <= this.#free && count <= out.length, `${count} slots of ${this.#free}`);
    this.#free -= count;
    let word = this.#cursor;
    for (let n = 0; n < count; ) {
      if (word >= this.#groups * WORDS_PER_GROUP) word = 0;
      const group = Math.floor(word / WORDS_PER_GROUP);
      if (this.#freeIn[group] === 0) {
        word = (group + 1) * WORDS_PER_GROUP;
        continue;
      }
      let free = ~this.#taken[word]!;
      const before = n;
      for (; free !== 0 && n < count; free &= free - 1) out[n++] = word * 32 + 31 - Math.clz32(free & -free);
      this.#freeIn[group]! -= n - before;
      this.#taken[word] = ~free;
      if (free === 0) word++;
    }
    this.#cursor = word;
  }

  /** Throws InvariantViolation when one of the `count` slots from `slot` on is free. */
  give(slot: number, count = 1): void {
    this.check(slot, count);
    for (let s = slot; s < slot + count; s++) {
      this.#taken[s >>> WORD_SHIFT]! &= ~(1 << (s & 31));
      this.#freeIn[s >>> GROUP_SHIFT]!++;
    }
    this.#free += count;
  }

  /** Throws InvariantViolation when one of the `count` slots from `slot` on is not taken. */
  check(slot: number, count = 1): void {
    for (let s = slot; s < slot + count; s++)
      if (((this.#taken[s >>> WORD_SHIFT] ?? 0) & (1 << (s & 31))) === 0)
        throw new InvariantViolation(`handle ${s} is not pinned`);
  }
}
