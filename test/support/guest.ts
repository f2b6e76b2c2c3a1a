import { FRAME_SIZE, type Gfn, type Gpa, gpaOf } from "../../src/base/units.ts";
import { GuestMemory, type GuestRegion } from "../../src/memory/guest-memory.ts";
import { DmaTrackingTable, NO_UNIT, type Unit } from "../../src/tracking/dtt.ts";
import { ENTRY_PRESENT, entryOffset, TU_ACCESSED, TU_PINNED } from "../../src/wire/dtt.ts";

/** Where the host "maps" guest RAM: a number to tell frames apart by, which nobody follows. */
export const HOST_BASE = 0x7f00_0000_0000;
/** From a host address to the same page in the second mapping, GuestRegion.presentAddress. */
export const PRESENT = 2 ** 50;

/** RAM of whole frames, zeroed; its host addresses are those of a linear mapping at `hostBase`. */
export function ramRegion(gpa: number, frames: number, hostBase = HOST_BASE): GuestRegion {
  const bytes = new Uint8Array(new ArrayBuffer(frames * FRAME_SIZE));
  const hostAddress = hostBase + gpa;
  return { gpa: gpa as Gpa, size: bytes.length, hostAddress, presentAddress: hostAddress + PRESENT, bytes };
}

/** A guest with one region of RAM, from `gpa` on. */
export const ram = (frames: number, gpa = 0): GuestMemory => new GuestMemory([ramRegion(gpa, frames)]);

/** Guest code writes 64 bits with one store; here nobody runs in between. */
export function store64(memory: GuestMemory, gpa: number, value: bigint): void {
  const raw = new Uint8Array(8);
  new DataView(raw.buffer).setBigUint64(0, value, true);
  memory.write(gpa, raw);
}

/** The guest's side of a DMA tracking table: what a driver does, by abi.md sections 1 and 2. */
export class GuestTable {
  readonly root: Gpa;
  readonly levels: number;
  readonly #memory: GuestMemory;
  #nextPage: number;

  /** Table pages are taken from `root` upwards. */
  constructor(memory: GuestMemory, root: number, levels: number) {
    this.#memory = memory;
    this.root = root as Gpa;
    this.levels = levels;
    this.#nextPage = root + FRAME_SIZE;
  }

  /** GPA of the entry of `level` for `gfn`; the tables above it are made when they are absent. */
  entry(gfn: number, level: number): number {
    let table: number = this.root;
    for (let l = this.levels; l > level; l--) {
      const at = table + entryOffset(gfn, l);
      const low = this.#memory.load32(at);
      if ((low & ENTRY_PRESENT) === 0) {
        table = this.#nextPage;
        this.#nextPage += FRAME_SIZE;
        store64(this.#memory, at, BigInt(table) | BigInt(ENTRY_PRESENT));
      } else table = (low & 0xffff_f000) >>> 0;
    }
    return table + entryOffset(gfn, level);
  }

  /** The unit of `gfn`; the tables on the way are made when they are absent. */
  unit(gfn: number): Unit {
    if (this.levels > 1) {
      const at = this.entry(gfn, 2);
      if ((this.#memory.load32(at) & ENTRY_PRESENT) === 0) {
        store64(this.#memory, at, BigInt(this.#nextPage) | BigInt(ENTRY_PRESENT));
        this.#nextPage += FRAME_SIZE;
      }
    }
    const unit = new DmaTrackingTable(this.#memory, this.root, this.levels).walk(gfn as Gfn);
    if (unit === NO_UNIT) throw new Error(`the table has no unit for frame ${gfn}`);
    return unit;
  }

  word(gfn: number): number {
    return this.#memory.load32(this.unit(gfn)) >>> 0;
  }

  set(gfn: number, word: number): void {
    const raw = new Uint8Array(4);
    new DataView(raw.buffer).setUint32(0, word, true);
    this.#memory.write(this.unit(gfn), raw);
  }

  /** Count a mapping and set A. Returns whether the frame is pinned: otherwise the driver must ask. */
  map(gfn: number): boolean {
    const before = this.#add(gfn, 1);
    this.#memory.or32(this.unit(gfn), TU_ACCESSED);
    return (before & TU_PINNED) !== 0;
  }

  unmap(gfn: number): void {
    this.#add(gfn, -1);
  }

  #add(gfn: number, delta: number): number {
    return add32(this.#memory, this.unit(gfn), delta);
  }
}

/** Atomic add, as a guest's locked instruction. Returns the value before. */
export function add32(memory: GuestMemory, gpa: number, delta: number): number {
  for (;;) {
    const seen = memory.load32(gpa);
    if (memory.compareExchange32(gpa, seen, (seen + delta) | 0) === seen) return seen;
  }
}

export const addressOf = (gfn: number): number => HOST_BASE + gpaOf(gfn as Gfn);
