import { HostError, invariant } from "../base/errors.ts";
import { grown } from "../base/frame-index.ts";
import { FRAME_SIZE, type Gfn, gpaOf } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import type { GfnBuffer } from "../policy/policy.ts";
import { BLOCK_FRAMES, Block, blockNumber, Mappings } from "./block.ts";
import type { FramePins, OrphanRange } from "./frame-pins.ts";
import type { Ledger } from "./ledger.ts";
import type { Pinner } from "./pinner.ts";
import { StalePages } from "./stale-pages.ts";

/** Guests of up to 8 TiB: frames, and where blocks of them end, are integers of 31 bits, which V8 keeps as such. */
const FRAME_LIMIT = 2 ** 31 - BLOCK_FRAMES;
/** Blocks that one slice of collectOrphans() looks at, and places for a block. */
const SLICE_BLOCKS = 64;
const SLICE_PLACES = 1024;

interface BlocksOptions {
  readonly memory: GuestMemory;
  readonly pinner: Pinner;
  readonly ledger: Ledger;
  /** Frames that the quota has room for. */
  room(): number;
  /** Whether a frame may be pinned that nobody has asked for. */
  mayPin(gfn: Gfn): boolean;
}

/**
 * Pins of a host that maps each page once and takes only so many mappings, as an IOMMU behind VFIO (type 1: 65,535). A
 * mapping cannot be split, nor replaced by a larger one while a device uses it. So
 *
 * - frames that follow each other, and that are pinned together, are one mapping, within an aligned block of 2 MiB;
 * - it grows into the hole around it when the aligned block that it then fills, of 2 MiB or less, is mostly in use, and a
 *   quarter of it was before: so what is hot ends as few mappings. Only frames that have memory are taken along;
 * - with more than half of the mappings taken it grows so far that the others suffice for all RAM that is left, whether
 *   that has memory or not;
 * - frames that nobody uses wait, with P, until nobody uses any frame of their mapping: then all go, in one pass;
 * - a frame that has to leave before leaves the ledger. Its page stays pinned until its mapping has no frame in the
 *   ledger: it is an orphan, as are those that a mapping has grown by, counted as pinned, and a frame that is pinned
 *   (again) takes it over.
 *
 * An orphan's page may be discarded, or its frame get other memory: it is never taken over then (EBUSY).
 */
export class Blocks implements FramePins {
  readonly #o: BlocksOptions;
  readonly #mappings = new Mappings();
  readonly #blocks = new Map<number, Block>();
  /** Mappings of no frame, which the host has not let go of yet. */
  readonly #idle = new Set<number>();
  readonly #stale: StalePages;
  #pages = 0;
  #lastBlock = -1;
  /** The block that was looked for last, if there is one. */
  #recent: Block | undefined;
  // What is to be pinned: frames [from, to), and whether only if all have memory.
  #from = new Int32Array(256);
  #to = new Int32Array(256);
  #present = new Uint8Array(256);
  #planned = 0;
  #addresses = new Float64Array(256);
  #lengths = new Int32Array(256);
  #handles = new Int32Array(256);
  #adjoins = new Uint8Array(256);

  constructor(options: BlocksOptions) {
    this.#o = options;
    this.#stale = new StalePages(options.memory, options.pinner, this.#mappings);
  }

  get orphans(): number {
    return this.#pages - this.#o.ledger.size;
  }
  get waiting(): number {
    return this.#mappings.waitingAll;
  }
  get abandoned(): number {
    let pages = 0;
    for (const id of this.#idle) pages += this.#mappings.count[id]!;
    return pages;
  }

  covers(gfn: Gfn): boolean {
    return this.#find(gfn) >= 0;
  }

  /** Tells ids of mappings as handles. */
  pin(gfns: readonly Gfn[], pinned: (gfn: Gfn, handle: number) => void, present = false): void {
    const fresh = this.#fresh(gfns);
    if (fresh.length > 0) this.#map(fresh, present);
    this.#enter(gfns, pinned);
  }

  adopt(
    pages: Iterable<readonly [gfn: Gfn, handle: number]>,
    pinned: (gfn: Gfn, handle: number) => void,
  ): void {
    for (const [handle, of] of Map.groupBy(pages, ([, handle]) => handle)) {
      this.#mapped(of[0]![0], of.length, handle);
      this.#enter(
        of.map(([gfn]) => gfn),
        pinned,
      );
    }
  }

  abandon(gfn: Gfn, id: number): void {
    this.#blockOf(gfn)!.leaves(gfn, id);
    if (this.#mappings.needed[id] === 0) this.#idle.add(id);
  }

  /** Those that wait for nobody else, who may go then. What is discarded is not split off: it becomes an orphan. */
  addOthers(gfns: GfnBuffer): boolean {
    const { leaving, needed, waiting, waitingAll } = this.#mappings;
    if (waitingAll === 0) return false;
    for (let i = 0; i < gfns.length; i++) this.used(gfns.at(i));
    for (const id of this.#countLeaving(gfns)) {
      if (waiting[id]! > 0 && leaving[id]! + waiting[id]! === needed[id] && waiting[id]! <= gfns.room)
        for (const gfn of this.#framesOf(id, (gfn, block) => block.isWaiting(gfn))) gfns.push(gfn);
      leaving[id] = 0;
    }
    return false;
  }

  dropWaiting(gfns: GfnBuffer, waits: (gfn: Gfn) => void): void {
    const { leaving, needed } = this.#mappings;
    const ids = this.#countLeaving(gfns);
    if (ids.some((id) => leaving[id] !== needed[id]))
      gfns.keep((i) => {
        const gfn = gfns.at(i);
        const id = this.#o.ledger.handle(gfn);
        if (leaving[id] === needed[id]) return true;
        this.#blockOf(gfn)!.setWaiting(gfn, id, true);
        waits(gfn);
        return false;
      });
    for (const id of ids) leaving[id] = 0;
  }

  used(gfn: Gfn): void {
    if (this.#mappings.waitingAll > 0) this.#blockOf(gfn)!.setWaiting(gfn, this.#o.ledger.handle(gfn), false);
  }

  /** The mappings that have `gfns`, how many of them each in `leaving`. `handles`: theirs, if they are known. */
  #countLeaving(gfns: GfnBuffer, handles?: Int32Array): number[] {
    const { leaving } = this.#mappings;
    const ids: number[] = [];
    for (let i = 0; i < gfns.length; i++) {
      const id = handles === undefined ? this.#o.ledger.handle(gfns.at(i)) : handles[i]!;
      if (leaving[id]!++ === 0) ids.push(id);
    }
    return ids;
  }

  release(gfns: GfnBuffer, handles: Int32Array): ReadonlySet<number> {
    const { leaving, needed } = this.#mappings;
    const ids = this.#countLeaving(gfns, handles);
    const whole = ids.filter((id) => leaving[id] === needed[id]);
    if (whole.length < ids.length)
      for (let i = 0; i < gfns.length; i++) {
        const id = handles[i]!;
        if (leaving[id] === needed[id]) continue;
        leaving[id]!--;
        this.#blockOf(gfns.at(i))!.leaves(gfns.at(i), id);
      }
    for (const id of whole) leaving[id] = 0;
    return this.#releaseWhole(whole);
  }

  releaseOrphans(): void {
    this.#releaseWhole([...this.#idle]);
  }

  collectOrphans({ first, end, discarded }: OrphanRange, from: number, out: Gfn[]): number | null {
    const last = Math.min(this.#lastBlock, Math.ceil(end / BLOCK_FRAMES) - 1);
    let number = Math.max(from, Math.floor(first / BLOCK_FRAMES)); // any range, not only of frames that are RAM
    const places = Math.min(last, number + SLICE_PLACES);
    const { needed, count } = this.#mappings;
    for (let n = 0; number <= places && n < SLICE_BLOCKS; number++) {
      const block = this.#blocks.get(number);
      if (!block) continue;
      n++;
      for (const id of block.ids) {
        if (needed[id] === count[id]) continue;
        const orphans = this.#framesOf(id, (gfn) => gfn >= first && gfn < end && !block.isNeeded(gfn));
        out.push(...(discarded ? this.#stale.find(id, orphans) : orphans));
      }
    }
    return number <= last ? number : null;
  }

  /** Those of `gfns` that no mapping has, ascending. Throws HostError for one whose page is stale, or that is too high. */
  #fresh(gfns: readonly Gfn[]): readonly Gfn[] {
    let again: Map<number, Gfn[]> | undefined;
    let ascending = true;
    // Frames behind the last one that have no mapping end here.
    let hole = 0;
    let before = -1;
    for (const gfn of gfns) {
      if (gfn >= FRAME_LIMIT)
        throw new HostError("pin", "EINVAL", `frame ${gfn} is beyond the 8 TiB that can be pinned`);
      const follows = gfn > before;
      ascending &&= follows;
      before = gfn;
      if (follows && gfn < hole) continue;
      const block = this.#blockOf(gfn);
      const id = block?.find(gfn) ?? -1;
      hole = id >= 0 ? 0 : (block?.holeEnd(gfn) ?? boundaryAfter(gfn));
      if (id < 0) continue;
      again ??= new Map();
      const of = again.get(id);
      if (of) of.push(gfn);
      else again.set(id, [gfn]);
    }
    for (const [id, of] of again ?? []) {
      const [stale] = this.#stale.find(id, of);
      if (stale === undefined) continue;
      const detail = `frame ${stale} has lost the page that is pinned for it, and others are in use with it`;
      throw new HostError("pin", "EBUSY", detail);
    }
    const fresh = again ? gfns.filter((gfn) => this.#find(gfn) < 0) : gfns;
    return ascending ? fresh : fresh.toSorted((a, b) => a - b);
  }

  /** Throws HostError; then nothing is mapped. */
  #map(fresh: readonly Gfn[], present: boolean): void {
    const pages = this.#plan(fresh, !present, present);
    try {
      this.#pin();
    } catch (error) {
      if (!(error instanceof HostError) || error.errno === "ENOSPC" || pages === fresh.length) throw error;
      this.#plan(fresh, false, false);
      this.#pin();
    }
  }

  #pin(): void {
    const { memory, pinner } = this.#o;
    const count = this.#planned;
    for (let i = 0; i < count; i++) {
      const gpa = gpaOf(this.#from[i]! as Gfn);
      const region = memory.find(gpa, FRAME_SIZE)!;
      const base = (this.#present[i] ? region.presentAddress : undefined) ?? region.hostAddress;
      this.#addresses[i] = base + (gpa - region.gpa);
      this.#lengths[i] = this.#to[i]! - this.#from[i]!;
    }
    pinner.pin(this.#addresses, count, this.#handles, this.#lengths, this.#from);
    for (let i = 0; i < count; i++) this.#mapped(this.#from[i]! as Gfn, this.#lengths[i]!, this.#handles[i]!);
  }

  /**
   * What to map for frames in ascending order: those that follow each other as one, and where it `grows` as large as is
   * worth it. Returns the number of pages.
   */
  #plan(fresh: readonly Gfn[], grows: boolean, present: boolean): number {
    const grain = grows ? this.#grain : 1;
    let room = grows ? Math.floor((this.#o.room() - fresh.length) / 2) : 0;
    let pages = 0;
    this.#planned = 0;
    if (fresh.length > this.#from.length) this.#reserve(fresh.length);
    for (let i = 0, done = 0; i < fresh.length; ) {
      // It may be in the one before, which has grown.
      if (fresh[i]! < done) {
        i++;
        continue;
      }
      const from = fresh[i]!;
      const { gpa, size } = this.#o.memory.find(gpaOf(from), FRAME_SIZE)!;
      const boundary = boundaryAfter(from);
      const limit = Math.min(boundary, (gpa + size) / FRAME_SIZE);
      let to: number = from;
      for (; to < limit && fresh[i] === to; i++) to++;
      const low = Math.max(done, boundary - BLOCK_FRAMES, gpa / FRAME_SIZE);
      const grew = room > 0 && this.#grow(from, to, low, limit, grain, room);
      if (!grew) this.#push(from, to, present);
      done = this.#to[this.#planned - 1]!;
      const planned = done - this.#from[this.#planned - 1]!;
      pages += planned;
      room -= planned - (to - from);
    }
    return pages;
  }

  #reserve(count: number): void {
    this.#from = grown(this.#from, count);
    this.#to = grown(this.#to, count);
    this.#present = grown(this.#present, count);
    this.#addresses = grown(this.#addresses, count);
    this.#lengths = grown(this.#lengths, count);
    this.#handles = grown(this.#handles, count);
  }

  #push(from: number, to: number, present: boolean): void {
    this.#from[this.#planned] = from;
    this.#to[this.#planned] = to;
    this.#present[this.#planned++] = Number(present);
  }

  /** Frames that a mapping should have, so that the mappings that are left suffice: a power of two. */
  get #grain(): number {
    const { pinner, memory } = this.#o;
    const { pinsMax, pinsLeft } = pinner;
    if (pinsMax === undefined || pinsLeft === undefined || 2 * pinsLeft > pinsMax) return 1;
    const unpinned = memory.size / FRAME_SIZE - this.#pages;
    let grain = 1;
    while (grain < BLOCK_FRAMES && grain * pinsLeft < unpinned) grain *= 2;
    return grain;
  }

  /** Plan more than frames [from, to), within [low, high). False where that may not be, or is not worth it. */
  #grow(from: Gfn, to: number, low: number, high: number, grain: number, room: number): boolean {
    const block = this.#blockOf(from);
    // With nobody beside it, and mappings enough.
    if (!block && grain === 1) return false;
    const size = block?.busySize(from, to) ?? 0;
    if (size === 0 && grain === 1) return false;
    const left = Math.max(low, block?.holeStart(from) ?? 0);
    const right = Math.min(high, block?.holeEnd(from) ?? high);
    const first = Math.max(left, from & -grain);
    const end = Math.min(right, (to + grain - 1) & -grain);
    const busy = size > 0 ? from & -size : from;
    const busyFirst = Math.max(left, busy);
    const busyEnd = Math.min(right, busy + size);
    if (busyEnd - busyFirst > end - first && this.#mayTake(busyFirst, busyEnd, from, to, room))
      if (this.#haveMemory(busyFirst, busyEnd)) {
        this.#push(busyFirst, busyEnd, true);
        return true;
      }
    if (end - first === to - from || !this.#mayTake(first, end, from, to, room)) return false;
    this.#push(first, end, false);
    return true;
  }

  /** Whether frames [first, end) may be pinned where [from, to) is asked for. */
  #mayTake(first: number, end: number, from: number, to: number, room: number): boolean {
    if (end - first - (to - from) > room) return false;
    for (let gfn = first; gfn < end; gfn++)
      if ((gfn < from || gfn >= to) && !this.#o.mayPin(gfn as Gfn)) return false;
    return true;
  }

  /** Of one region. */
  #haveMemory(first: number, end: number): boolean {
    if (this.#o.memory.presentAddress(gpaOf(first as Gfn)) === undefined) return false;
    try {
      const gfns = Array.from({ length: end - first }, (_, i) => (first + i) as Gfn);
      return this.#stale.withoutMemory(gfns).length === 0;
    } catch (error) {
      if (!(error instanceof HostError)) throw error;
      return false;
    }
  }

  /** Those frames of a mapping that `of` says. */
  #framesOf(id: number, of: (gfn: Gfn, block: Block) => boolean): Gfn[] {
    const first = this.#mappings.first[id]! as Gfn;
    const block = this.#blockOf(first)!;
    const gfns: Gfn[] = [];
    for (let gfn = first; gfn < this.#mappings.end(id); gfn++) if (of(gfn, block)) gfns.push(gfn);
    return gfns;
  }

  #mapped(first: Gfn, count: number, handle: number): void {
    const number = blockNumber(first);
    invariant(blockNumber(first + count - 1) === number, `a mapping of ${count} frames at frame ${first}`);
    const region = this.#o.memory.find(gpaOf(first), FRAME_SIZE);
    const hostAddress = region ? region.hostAddress + (gpaOf(first) - region.gpa) : Number.NaN;
    let block = this.#blockOf(first);
    if (!block) {
      block = new Block(this.#mappings, number);
      this.#blocks.set(number, block);
    }
    block.insert(this.#mappings.add(first, count, handle, hostAddress));
    this.#pages += count;
    this.#lastBlock = Math.max(this.#lastBlock, number);
  }

  /** The frames, all of mappings, come into the ledger. */
  #enter(gfns: readonly Gfn[], pinned: (gfn: Gfn, handle: number) => void): void {
    for (let i = 0; i < gfns.length; ) {
      const block = this.#blockOf(gfns[i]!)!;
      const id = block.find(gfns[i]!);
      const first = this.#mappings.first[id]!;
      const end = this.#mappings.end(id);
      if (this.#idle.size > 0) this.#idle.delete(id);
      for (; i < gfns.length && gfns[i]! >= first && gfns[i]! < end; i++) {
        block.enters(gfns[i]!, id);
        pinned(gfns[i]!, id);
      }
    }
  }

  /** Returns those of them that the host has kept. */
  #releaseWhole(ids: number[]): ReadonlySet<number> {
    const { first, count, handle } = this.#mappings;
    if (ids.some((id, i) => i > 0 && first[id]! < first[ids[i - 1]!]!))
      ids.sort((a, b) => first[a]! - first[b]!);
    this.#handles = grown(this.#handles, ids.length);
    this.#adjoins = grown(this.#adjoins, ids.length);
    for (let i = 0; i < ids.length; i++) {
      this.#handles[i] = handle[ids[i]!]!;
      this.#adjoins[i] = Number(i > 0 && this.#adjoin(ids[i - 1]!, ids[i]!));
    }
    const released = this.#o.pinner.release(this.#handles, ids.length, this.#adjoins);
    for (let i = 0; i < released; i++) {
      const id = ids[i]!;
      const block = this.#blockOf(first[id]!)!;
      block.remove(id);
      if (block.ids.length === 0) {
        this.#blocks.delete(block.number);
        this.#recent = undefined;
      }
      this.#idle.delete(id);
      this.#stale.forget(id);
      this.#pages -= count[id]!;
      this.#mappings.remove(id);
    }
    return new Set(ids.slice(released));
  }

  /** Whether one mapping is the next behind another in a block, with nothing but the guest's RAM between them. */
  #adjoin(before: number, id: number): boolean {
    const { first } = this.#mappings;
    if (this.#blockOf(first[id]!)!.before(first[id]!) !== before) return false;
    const length = (this.#mappings.end(id) - first[before]!) * FRAME_SIZE;
    return this.#o.memory.find(gpaOf(first[before]! as Gfn), length) !== undefined;
  }

  /** The mapping that has `gfn`, or -1. */
  #find(gfn: number): number {
    return this.#blockOf(gfn)?.find(gfn) ?? -1;
  }

  #blockOf(gfn: number): Block | undefined {
    const number = blockNumber(gfn);
    if (this.#recent?.number !== number) this.#recent = this.#blocks.get(number);
    return this.#recent;
  }
}

const boundaryAfter = (gfn: number): number => (blockNumber(gfn) + 1) * BLOCK_FRAMES;
