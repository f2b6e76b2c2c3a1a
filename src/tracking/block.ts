import type { Gfn } from "../base/units.ts";

/** Frames of a block: 2 MiB, what a second-level entry of an x86 IOMMU maps. No mapping crosses one. */
export const BLOCK_FRAMES = 512;
const WORD_BITS = 32;

/** Frames that one mapping pins. */
export interface MappedRun {
  readonly first: Gfn;
  readonly count: number;
  readonly handle: number;
  /** Of its first page; NaN when that was no RAM. */
  readonly hostAddress: number;
  /** How many of its frames are in the ledger. */
  needed: number;
  /** Frames whose memory is not the pinned page any more. */
  stale?: Set<Gfn>;
}

const endOf = ({ first, count }: MappedRun): number => first + count;

/** The mappings of 512 aligned frames, and which of these frames the ledger has. */
export class Block {
  /** Ascending. */
  readonly runs: MappedRun[] = [];
  readonly #first: number;
  readonly #needed = new Uint32Array(BLOCK_FRAMES / WORD_BITS);

  constructor(number: number) {
    this.#first = number * BLOCK_FRAMES;
  }

  find(gfn: Gfn): MappedRun | undefined {
    const run = this.runs[this.#after(gfn) - 1];
    return run && gfn < endOf(run) ? run : undefined;
  }

  /** The frames around `gfn`, which no mapping has, up to the next mappings: [from, to). */
  hole(gfn: Gfn): readonly [from: number, to: number] {
    const next = this.#after(gfn);
    const before = this.runs[next - 1];
    return [before ? endOf(before) : this.#first, this.runs[next]?.first ?? this.#first + BLOCK_FRAMES];
  }

  insert(run: MappedRun): void {
    this.runs.splice(this.#after(run.first), 0, run);
  }

  remove(run: MappedRun): void {
    this.runs.splice(this.runs.indexOf(run), 1);
  }

  isNeeded(gfn: Gfn): boolean {
    const at = gfn - this.#first;
    return ((this.#needed[at >>> 5]! >>> (at & 31)) & 1) === 1;
  }

  setNeeded(gfn: Gfn, needed: boolean): void {
    const at = gfn - this.#first;
    if (needed) this.#needed[at >>> 5]! |= 1 << (at & 31);
    else this.#needed[at >>> 5]! &= ~(1 << (at & 31));
  }

  /** Frames of the ledger among `size` aligned ones, a power of two. */
  neededIn(first: number, size: number): number {
    const at = first - this.#first;
    if (size < WORD_BITS) return ones((this.#needed[at >>> 5]! >>> (at & 31)) & ((1 << size) - 1));
    let sum = 0;
    for (let word = at >>> 5; word < (at + size) >>> 5; word++) sum += ones(this.#needed[word]!);
    return sum;
  }

  /** Index of the first run behind `gfn`. */
  #after(gfn: number): number {
    let low = 0;
    for (let high = this.runs.length; low < high; ) {
      const middle = (low + high) >>> 1;
      if (this.runs[middle]!.first > gfn) high = middle;
      else low = middle + 1;
    }
    return low;
  }
}

/** Bits set in 32. */
function ones(word: number): number {
  const pairs = word - ((word >>> 1) & 0x5555_5555);
  const nibbles = (pairs & 0x3333_3333) + ((pairs >>> 2) & 0x3333_3333);
  return Math.imul((nibbles + (nibbles >>> 4)) & 0x0f0f_0f0f, 0x0101_0101) >>> 24;
}
