import { NotGuestRam, ProtocolError } from "../base/errors.ts";
import { FRAME_SIZE, type Gfn, type Gpa, gpaOf } from "../base/units.ts";

/** A contiguous range of guest RAM, mapped into this process. */
export interface GuestRegion {
  readonly gpa: Gpa;
  /** Bytes; a multiple of 4 KiB. */
  readonly size: number;
  /** Virtual address of the first byte in this process; 0 when the RAM is a SharedArrayBuffer, which has none. */
  readonly hostAddress: number;
  /**
   * Where a pin of one of its pages finds that page, as at hostAddress, but is refused where the page has no memory, and
   * gives it none. Undefined where the host has no such mapping of it.
   */
  readonly presentAddress?: number | undefined;
  readonly bytes: Uint8Array;
}

/** What a device does to guest memory. */
export type DmaAccess = "read" | "write";

/**
 * What a device model may do with guest memory. All throw NotGuestRam for what is not RAM; behind an IOMMU also
 * DmaFault.
 */
export interface GuestAccess {
  /** Copy `into.length` bytes out of the guest. Copy once, then check: the guest may change them meanwhile. */
  read(gpa: number, into: Uint8Array): void;
  write(gpa: number, from: Uint8Array): void;
  /** Ring indices: 2-byte aligned. ORDERING: acquire; pairs with the driver's write barrier before its idx update. */
  load16(gpa: number): number;
  /** ORDERING: release; pairs with the driver's read barrier after it has seen idx. */
  store16(gpa: number, value: number): void;
  /**
   * The bytes in place, in pieces; `done` counts those before. The piece must not be kept, and `access` is all that is
   * done to it.
   */
  transfer(
    gpa: number,
    length: number,
    each: (piece: Uint8Array, done: number) => void,
    access: DmaAccess,
  ): void;
}

interface Mapped extends GuestRegion {
  readonly end: number;
  readonly words: Int32Array;
  readonly halves: Uint16Array;
}

function mapped({ gpa, size, hostAddress, presentAddress, bytes }: GuestRegion): Mapped {
  return {
    gpa,
    size,
    hostAddress,
    presentAddress,
    bytes,
    end: gpa + size,
    words: new Int32Array(bytes.buffer, bytes.byteOffset, size / 4),
    halves: new Uint16Array(bytes.buffer, bytes.byteOffset, size / 2),
  };
}

const covers = (outer: GuestRegion, inner: GuestRegion): boolean =>
  outer.gpa <= inner.gpa &&
  inner.gpa + inner.size <= outer.gpa + outer.size &&
  outer.hostAddress - outer.gpa === inner.hostAddress - inner.gpa;

/** What was used last when nothing was. */
const NONE = mapped({ gpa: 0 as Gpa, size: 0, hostAddress: 0, bytes: new Uint8Array(0) });

/**
 * Guest RAM by region, bounds-checked. With the software IOMMU's shared words, the only place that calls Atomics.
 *
 * Atomics on a plain ArrayBuffer over mmapped memory: ECMAScript promises cross-agent atomicity for shared buffers
 * only, but V8 emits the same locked instructions for both (docs/adr/0001).
 */
export class GuestMemory implements GuestAccess {
  #regions: readonly Mapped[] = [];
  #last: Mapped = NONE;

  constructor(regions: readonly GuestRegion[] = []) {
    this.setRegions(regions);
  }

  get regions(): readonly GuestRegion[] {
    return this.#regions;
  }

  /** RAM in bytes, over all regions. */
  get size(): number {
    return this.#regions.reduce((sum, r) => sum + r.size, 0);
  }

  /** Every frame of RAM, below `limit` if there is one. */
  *frames(limit = Number.POSITIVE_INFINITY): Generator<Gfn> {
    for (const { gpa, end } of this.#regions)
      for (let gfn = gpa / FRAME_SIZE; gfn < Math.min(limit, end / FRAME_SIZE); gfn++) yield gfn as Gfn;
  }

  setRegions(regions: readonly GuestRegion[]): void {
    const sorted = regions
      .map((r): Mapped => {
        if (r.gpa % FRAME_SIZE || r.size % FRAME_SIZE || r.bytes.byteOffset % FRAME_SIZE || r.size <= 0)
          throw new ProtocolError(
            `RAM region 0x${r.gpa.toString(16)}+0x${r.size.toString(16)} is not in whole frames`,
          );
        return mapped(r);
      })
      .sort((a, b) => a.gpa - b.gpa);
    for (const [i, r] of sorted.entries())
      if (i > 0 && sorted[i - 1]!.end > r.gpa)
        throw new ProtocolError(`RAM regions overlap at 0x${r.gpa.toString(16)}`);
    this.#regions = sorted;
    this.#last = NONE;
  }

  /** The region that holds all of [gpa, gpa + length), or undefined. */
  find(gpa: number, length: number): GuestRegion | undefined {
    return this.#find(gpa, length);
  }

  /** Virtual address of `gpa`, whose frame must be RAM; see GuestRegion.hostAddress. */
  hostAddress(gpa: number): number {
    const r = this.#at(gpa, 1);
    return r.hostAddress + (gpa - r.gpa);
  }

  /** The same in the mapping at GuestRegion.presentAddress, if there is one. */
  presentAddress(gpa: number): number | undefined {
    const { gpa: start, presentAddress } = this.#at(gpa, 1);
    return presentAddress === undefined ? undefined : presentAddress + (gpa - start);
  }

  /** Of `gfns`, which are RAM, those that `regions` would back with other memory, or with none. */
  backedOtherwise(regions: readonly GuestRegion[], gfns: Iterable<Gfn>): Gfn[] {
    if (this.#regions.every((r) => regions.some((n) => covers(n, r)))) return [];
    const next = new GuestMemory(regions);
    return [...gfns].filter((gfn) => {
      const gpa = gpaOf(gfn);
      return !next.find(gpa, FRAME_SIZE) || next.hostAddress(gpa) !== this.hostAddress(gpa);
    });
  }

  read(gpa: number, into: Uint8Array): void {
    this.transfer(gpa, into.length, (piece, done) => into.set(piece, done));
  }

  write(gpa: number, from: Uint8Array): void {
    this.transfer(gpa, from.length, (piece, done) => piece.set(from.subarray(done, done + piece.length)));
  }

  transfer(gpa: number, length: number, each: (piece: Uint8Array, done: number) => void): void {
    const whole = this.#find(gpa, length);
    if (whole) {
      each(whole.bytes.subarray(gpa - whole.gpa, gpa - whole.gpa + length), 0);
      return;
    }
    // Two passes, so that nothing is transferred when the end is not RAM.
    const pieces: Uint8Array[] = [];
    for (let done = 0; done < length; ) {
      const r = this.#find(gpa + done, 1);
      if (!r) throw new NotGuestRam(gpa, length);
      const size = Math.min(length - done, r.end - (gpa + done));
      pieces.push(r.bytes.subarray(gpa + done - r.gpa, gpa + done - r.gpa + size));
      done += size;
    }
    let done = 0;
    for (const piece of pieces) {
      each(piece, done);
      done += piece.length;
    }
  }

  load16(gpa: number): number {
    const r = this.#aligned(gpa, 2);
    return Atomics.load(r.halves, (gpa - r.gpa) / 2);
  }

  store16(gpa: number, value: number): void {
    const r = this.#aligned(gpa, 2);
    Atomics.store(r.halves, (gpa - r.gpa) / 2, value);
  }

  /** Signed 32-bit, as all the word operations below. ORDERING: acquire. */
  load32(gpa: number): number {
    const r = this.#aligned(gpa, 4);
    return Atomics.load(r.words, (gpa - r.gpa) / 4);
  }

  /**
   * ORDERING: none, as READ_ONCE() in a kernel: one access that is not torn, for a value that a compareExchange32 then
   * confirms. V8 makes it one instruction, and each of Atomics a call.
   */
  peek32(gpa: number): number {
    const r = this.#aligned(gpa, 4);
    const word = r.words[(gpa - r.gpa) / 4];
    // Unmapped since: Atomics would throw.
    if (word === undefined) throw new NotGuestRam(gpa, 4);
    return word;
  }

  /** ORDERING: release. */
  store32(gpa: number, value: number): void {
    const r = this.#aligned(gpa, 4);
    Atomics.store(r.words, (gpa - r.gpa) / 4, value);
  }

  /** Full barrier. Returns the value before. */
  add32(gpa: number, value: number): number {
    const r = this.#aligned(gpa, 4);
    return Atomics.add(r.words, (gpa - r.gpa) / 4, value);
  }

  /** Full barrier. Returns the value before. */
  or32(gpa: number, bits: number): number {
    const r = this.#aligned(gpa, 4);
    return Atomics.or(r.words, (gpa - r.gpa) / 4, bits);
  }

  /** Full barrier. Returns the value before. */
  and32(gpa: number, bits: number): number {
    const r = this.#aligned(gpa, 4);
    return Atomics.and(r.words, (gpa - r.gpa) / 4, bits);
  }

  /** Full barrier. Returns the value before, which equals `expected` iff the word was replaced. */
  compareExchange32(gpa: number, expected: number, replacement: number): number {
    const r = this.#aligned(gpa, 4);
    return Atomics.compareExchange(r.words, (gpa - r.gpa) / 4, expected, replacement);
  }

  #find(gpa: number, length: number): Mapped | undefined {
    const last = this.#last;
    if (last !== NONE && gpa >= last.gpa && gpa + length <= last.end) return last;
    for (const r of this.#regions)
      if (gpa >= r.gpa && gpa + length <= r.end) {
        this.#last = r;
        return r;
      }
    return undefined;
  }

  #at(gpa: number, length: number): Mapped {
    const r = this.#find(gpa, length);
    if (!r) throw new NotGuestRam(gpa, length);
    return r;
  }

  /**
   * The region that holds the aligned item of `size` bytes at `gpa`. The first line is every access of a driver's hot
   * path: an index that its 32-bit form equals is an integer, so `gpa` is aligned, and regions are whole frames, so an
   * item that begins in one ends in it.
   */
  #aligned(gpa: number, size: 2 | 4): Mapped {
    const last = this.#last;
    const offset = gpa - last.gpa;
    const at = offset / size;
    return (at | 0) === at && at >= 0 && offset < last.size ? last : this.#alignedElsewhere(gpa, size);
  }

  #alignedElsewhere(gpa: number, size: number): Mapped {
    if (gpa % size) throw new NotGuestRam(gpa, size);
    return this.#at(gpa, size);
  }
}
