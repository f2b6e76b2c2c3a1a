import { grown } from "../base/frame-index.ts";

/** Frames of a block: 2 MiB, what a second-level entry of an x86 IOMMU maps. No mapping crosses one. */
export const BLOCK_FRAMES = 512;
const BLOCK_SHIFT = 9;
/** The block that has a frame. Frames are 31-bit integers here: see Blocks. */
export const blockNumber = (gfn: number): number => gfn >> BLOCK_SHIFT;
const WORD_BITS = 32;

/** Mappings, by an id of 0 and up that each keeps: a structure of arrays, for tens of thousands of them. */
export class Mappings {
  /** First frame, and how many. */
  first = new Int32Array(16);
  count = new Int32Array(16);
  /** The pinner's. */
  handle = new Int32Array(16);
  /** Of the first page; NaN when that was no RAM. */
  hostAddress = new Float64Array(16);
  /** How many of the frames are in the ledger. */
  needed = new Int32Array(16);
  /** Of those, how many are not in use, and wait for the others. */
  waiting = new Int32Array(16);
  /** And how many are about to leave it; 0 between calls. */
  leaving = new Int32Array(16);
  /** In all mappings. */
  waitingAll = 0;
  readonly #free: number[] = [];
  #ids = 0;

  add(first: number, count: number, handle: number, hostAddress: number): number {
    const id = this.#free.pop() ?? this.#ids++;
    if (id === this.first.length) this.#grow(2 * id);
    this.first[id] = first;
    this.count[id] = count;
    this.handle[id] = handle;
    this.hostAddress[id] = hostAddress;
    this.needed[id] = 0;
    this.waiting[id] = 0;
    this.leaving[id] = 0;
    return id;
  }

  remove(id: number): void {
    this.#free.push(id);
  }

  end(id: number): number {
    return this.first[id]! + this.count[id]!;
  }

  #grow(length: number): void {
    this.first = grown(this.first, length);
    this.count = grown(this.count, length);
    this.handle = grown(this.handle, length);
    this.hostAddress = grown(this.hostAddress, length);
    this.needed = grown(this.needed, length);
    this.waiting = grown(this.waiting, length);
    this.leaving = grown(this.leaving, length);
  }
}

/** The mappings of 512 aligned frames, which of these frames the ledger has, and which of those wait for others. */
export class Block {
  readonly number: number;
  /** Ids, by first frame. */
  readonly ids: number[] = [];
  readonly #mappings: Mappings;
  readonly #first: number;
  readonly #needed = new Int32Array(BLOCK_FRAMES / WORD_BITS);
  readonly #waiting = new Int32Array(BLOCK_FRAMES / WORD_BITS);
  #neededAll = 0;

  constructor(mappings: Mappings, number: number) {
    this.#mappings = mappings;
    this.number = number;
    this.#first = number * BLOCK_FRAMES;
  }

  /** The mapping that has `gfn`, or -1. */
  find(gfn: number): number {
    const id = this.before(gfn + 1);
    return id >= 0 && gfn < this.#mappings.end(id) ? id : -1;
  }

  /** The last mapping that begins before `gfn`, or -1. */
  before(gfn: number): number {
    const index = this.#after(gfn - 1);
    return index === 0 ? -1 : this.ids[index - 1]!;
  }

  /** Where the mapping before `gfn`, which has none, ends. */
  holeStart(gfn: number): number {
    const before = this.before(gfn);
    return before < 0 ? this.#first : this.#mappings.end(before);
  }

  /** Where the mapping behind `gfn`, which has none, begins. */
  holeEnd(gfn: number): number {
    const behind = this.ids[this.#after(gfn)];
    return behind === undefined ? this.#first + BLOCK_FRAMES : this.#mappings.first[behind]!;
  }

  insert(id: number): void {
    const at = this.#after(this.#mappings.first[id]!);
    if (at === this.ids.length) this.ids.push(id);
    else this.ids.splice(at, 0, id);
  }

  /** With the frames that the ledger has of it. */
  remove(id: number): void {
    const first = this.#mappings.first[id]!;
    const at = this.#after(first) - 1;
    if (at === this.ids.length - 1) this.ids.pop();
    else this.ids.splice(at, 1);
    for (let gfn = first; gfn < this.#mappings.end(id); gfn++) if (this.isNeeded(gfn)) this.leaves(gfn, id);
  }

  isNeeded(gfn: number): boolean {
    return isSet(this.#needed, gfn - this.#first);
  }

  /** The ledger has `gfn`, of this mapping, from now on. */
  enters(gfn: number, id: number): void {
    flip(this.#needed, gfn - this.#first);
    this.#neededAll++;
    this.#mappings.needed[id]!++;
  }

  leaves(gfn: number, id: number): void {
    this.setWaiting(gfn, id, false);
    flip(this.#needed, gfn - this.#first);
    this.#neededAll--;
    this.#mappings.needed[id]!--;
  }

  isWaiting(gfn: number): boolean {
    return isSet(this.#waiting, gfn - this.#first);
  }

  setWaiting(gfn: number, id: number, waits: boolean): void {
    if (this.isWaiting(gfn) === waits) return;
    flip(this.#waiting, gfn - this.#first);
    const more = waits ? 1 : -1;
    this.#mappings.waiting[id]! += more;
    this.#mappings.waitingAll += more;
  }

  /**
   * Of the aligned blocks around frames [from, to) the largest that they make mostly needed, and of which a quarter is
   * needed already; 0 for none.
   */
  busySize(from: number, to: number): number {
    for (let size = BLOCK_FRAMES; size > to - from; size >>= 1) {
      if (!isBusy(this.#neededAll, to - from, size)) continue;
      const start = from & -size;
      if (to > start + size) return 0;
      if (isBusy(this.#neededIn(start, size), to - from, size)) return size;
    }
    return 0;
  }

  /** Frames of the ledger among `size` aligned ones, a power of two. */
  #neededIn(first: number, size: number): number {
    const at = first - this.#first;
    if (size < WORD_BITS) return ones((this.#needed[at >>> 5]! >>> (at & 31)) & ((1 << size) - 1));
    let sum = 0;
    for (let word = at >>> 5; word < (at + size) >>> 5; word++) sum += ones(this.#needed[word]!);
    return sum;
  }

  /** Index in `ids` of the first mapping behind `gfn`. */
  #after(gfn: number): number {
    let low = 0;
    for (let high = this.ids.length; low < high; ) {
      const middle = (low + high) >>> 1;
      if (this.#mappings.first[this.ids[middle]!]! > gfn) high = middle;
      else low = middle + 1;
    }
    return low;
  }
}

/** `hot` of `size` frames are needed, and `more` come to them. */
const isBusy = (hot: number, more: number, size: number): boolean =>
  4 * hot >= size && 2 * (hot + more) > size;

const isSet = (bits: Int32Array, at: number): boolean => ((bits[at >>> 5]! >>> (at & 31)) & 1) === 1;
function flip(bits: Int32Array, at: number): void {
  bits[at >>> 5]! ^= 1 << (at & 31);
}

/** Bits set in 32. */
function ones(word: number): number {
  const pairs = word - ((word >>> 1) & 0x5555_5555);
  const nibbles = (pairs & 0x3333_3333) + ((pairs >>> 2) & 0x3333_3333);
  return Math.imul((nibbles + (nibbles >>> 4)) & 0x0f0f_0f0f, 0x0101_0101) >>> 24;
}
