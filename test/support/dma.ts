import { FRAME_SIZE, type Gfn, type Gpa, gfnOf, type Iova } from "../../src/base/units.ts";
import {
  type DmaApi,
  type DmaBuffer,
  type DmaDirection,
  DmaMapFailed,
  type DmaSegment,
  type PageAllocator,
} from "../../src/driver/dma-api.ts";
import { type DmaGate, NO_FRAME } from "../../src/memory/gated-memory.ts";
import type { GuestMemory } from "../../src/memory/guest-memory.ts";
import { random } from "./random.ts";

/** Frames [first, first + frames) of a guest, handed out in no order; a frame that is still mapped must not come back. */
export class TestPages implements PageAllocator {
  readonly #memory: GuestMemory;
  /** In no order. */
  readonly #free: number[];
  readonly #isFree: Set<number>;
  readonly #next = random(1);
  /** Set by TestDma. */
  isMapped: (gfn: number) => boolean = () => false;
  used = 0;

  constructor(memory: GuestMemory, first: number, frames: number) {
    this.#memory = memory;
    this.#free = Array.from({ length: frames }, (_, i) => first + i);
    this.#isFree = new Set(this.#free);
  }

  allocate(frames: number): Gpa | undefined {
    const first =
      frames === 1
        ? this.#free[this.#next(this.#free.length)]
        : this.#free.find((gfn) => this.#run(gfn, frames));
    if (first === undefined) return undefined;
    for (let i = 0; i < frames; i++) this.#take(first + i);
    this.used += frames;
    this.#memory.write(first * FRAME_SIZE, new Uint8Array(frames * FRAME_SIZE));
    return (first * FRAME_SIZE) as Gpa;
  }

  free(gpa: Gpa, frames: number): void {
    for (let gfn: number = gfnOf(gpa); gfn < gfnOf(gpa) + frames; gfn++) {
      if (this.#isFree.has(gfn)) throw new Error(`frame ${gfn} is freed twice`);
      if (this.isMapped(gfn)) throw new Error(`frame ${gfn} is freed while it is mapped`);
      this.#free.push(gfn);
      this.#isFree.add(gfn);
    }
    this.used -= frames;
  }

  #take(gfn: number): void {
    this.#isFree.delete(gfn);
    this.#free[this.#free.indexOf(gfn)] = this.#free.at(-1)!;
    this.#free.pop();
  }

  #run(first: number, frames: number): boolean {
    for (let i = 1; i < frames; i++) if (!this.#isFree.has(first + i)) return false;
    return true;
  }
}

/**
 * The DMA API at its simplest: an address is a GPA, and the gate lets a device reach exactly the frames that are
 * mapped. Every unmap must be that of a mapping.
 */
export class TestDma implements DmaApi {
  readonly gate: DmaGate = {
    enter() {},
    leave() {},
    translate: (page) => (this.isMapped(page) ? (page as Gfn) : NO_FRAME),
    request: () => false,
    fault() {},
  };
  /** Every n-th attempt to map fails. */
  failEvery = Number.POSITIVE_INFINITY;
  attempts = 0;
  failures = 0;
  /** Bytes of each mapping made, by direction. */
  readonly mapped: Record<DmaDirection, number> = { "to-device": 0, "from-device": 0, bidirectional: 0 };
  syncs = 0;
  /** The most mappings that one frame had at once. */
  countMax = 0;
  readonly #pages: TestPages;
  readonly #live = new Map<string, number>();
  readonly #count = new Map<number, number>();

  constructor(pages: TestPages) {
    this.#pages = pages;
    pages.isMapped = (gfn) => this.isMapped(gfn);
  }

  isMapped(gfn: number): boolean {
    return (this.#count.get(gfn) ?? 0) > 0;
  }

  /** Mappings that were not undone. */
  get live(): number {
    return [...this.#live.values()].reduce((sum, n) => sum + n, 0);
  }

  mapSingle(gpa: Gpa, length: number, direction: DmaDirection): Iova {
    this.#attempt();
    this.#map(gpa, length, direction);
    return gpa as number as Iova;
  }

  unmapSingle(iova: Iova, length: number, direction: DmaDirection): void {
    this.#unmap(iova, length, direction);
  }

  mapSg(list: readonly DmaBuffer[], direction: DmaDirection): DmaSegment[] {
    this.#attempt();
    return list.map(({ gpa, length }) => {
      this.#map(gpa, length, direction);
      return { iova: gpa as number as Iova, length };
    });
  }

  unmapSg(list: readonly DmaSegment[], direction: DmaDirection): void {
    for (const { iova, length } of list) this.#unmap(iova, length, direction);
  }

  allocCoherent(length: number): { gpa: Gpa; iova: Iova } {
    this.#attempt();
    const gpa = this.#pages.allocate(Math.ceil(length / FRAME_SIZE));
    if (gpa === undefined) throw new DmaMapFailed("no-memory");
    this.#map(gpa, length, "bidirectional");
    return { gpa, iova: gpa as number as Iova };
  }

  freeCoherent(gpa: Gpa, iova: Iova, length: number): void {
    this.#unmap(iova, length, "bidirectional");
    this.#pages.free(gpa, Math.ceil(length / FRAME_SIZE));
  }

  syncForCpu(iova: Iova, length: number): void {
    this.#sync(iova, length);
  }

  syncForDevice(iova: Iova, length: number): void {
    this.#sync(iova, length);
  }

  #sync(iova: Iova, length: number): void {
    for (const gfn of framesOf(iova, length))
      if (!this.isMapped(gfn)) throw new Error(`sync of frame ${gfn}, which is not mapped`);
    this.syncs++;
  }

  #attempt(): void {
    if (++this.attempts % this.failEvery !== 0) return;
    this.failures++;
    throw new DmaMapFailed("refused", 8);
  }

  #map(address: number, length: number, direction: DmaDirection): void {
    if (length <= 0) throw new Error("an empty mapping");
    const key = `${address}+${length} ${direction}`;
    this.#live.set(key, (this.#live.get(key) ?? 0) + 1);
    this.mapped[direction] += length;
    for (const gfn of framesOf(address, length)) {
      const count = (this.#count.get(gfn) ?? 0) + 1;
      this.#count.set(gfn, count);
      this.countMax = Math.max(this.countMax, count);
    }
  }

  #unmap(address: number, length: number, direction: DmaDirection): void {
    const key = `${address}+${length} ${direction}`;
    const live = this.#live.get(key) ?? 0;
    if (live === 0) throw new Error(`unmap of ${key}, which is not mapped`);
    if (live === 1) this.#live.delete(key);
    else this.#live.set(key, live - 1);
    for (const gfn of framesOf(address, length)) this.#count.set(gfn, this.#count.get(gfn)! - 1);
  }
}

/** A DMA API that joins neighbours of a scatter list, as behind an IOMMU that translates. */
export class JoiningDma extends TestDma {
  readonly #parts = new Map<readonly DmaSegment[], DmaSegment[]>();

  override mapSg(list: readonly DmaBuffer[], direction: DmaDirection): DmaSegment[] {
    const parts = super.mapSg(list, direction);
    const joined: { iova: Iova; length: number }[] = [];
    for (const { iova, length } of parts) {
      const last = joined.at(-1);
      if (last && last.iova + last.length === iova) last.length += length;
      else joined.push({ iova, length });
    }
    this.#parts.set(joined, parts);
    return joined;
  }
  override unmapSg(list: readonly DmaSegment[], direction: DmaDirection): void {
    super.unmapSg(this.#parts.get(list)!, direction);
    this.#parts.delete(list);
  }
}

/** Broken twin: what a driver looks like that unmaps its buffers before the device is done with them. */
export class EarlyUnmap extends TestDma {
  override mapSingle(gpa: Gpa, length: number, direction: DmaDirection): Iova {
    const iova = super.mapSingle(gpa, length, direction);
    super.unmapSingle(iova, length, direction);
    return iova;
  }
  override unmapSingle(): void {}
  override mapSg(list: readonly DmaBuffer[], direction: DmaDirection): DmaSegment[] {
    const segments = super.mapSg(list, direction);
    super.unmapSg(segments, direction);
    return segments;
  }
  override unmapSg(): void {}
  override syncForCpu(): void {}
  override syncForDevice(): void {}
}

function framesOf(address: number, length: number): number[] {
  const first = gfnOf(address);
  return Array.from({ length: gfnOf(address + length - 1) - first + 1 }, (_, i) => first + i);
}
