import { type Bdf, FRAME_SIZE, type Gpa, gfnOf, type Iova } from "../base/units.ts";
import type { DriverCounters } from "./counters.ts";
import {
  type DmaApi,
  type DmaBuffer,
  type DmaDirection,
  DmaMapFailed,
  type DmaSegment,
  type PageAllocator,
} from "./dma-api.ts";
import type { FrameRange } from "./pin-batches.ts";
import type { TrackingUnits } from "./units.ts";

/** Frames that `length` bytes from `address` on lie in; as the kernel counts, none only for 0 bytes at a frame's start. */
export const nrFrames = (address: number, length: number): number =>
  Math.ceil(((address % FRAME_SIZE) + length) / FRAME_SIZE);

/** The DMA API of a function in bypass: a DMA address is the guest's, and nothing is counted. Linux's dma-direct. */
export class DirectDma implements DmaApi {
  readonly #pages: PageAllocator;

  constructor(pages: PageAllocator) {
    this.#pages = pages;
  }

  mapSingle(gpa: Gpa, _length: number, _direction: DmaDirection): Iova {
    return iovaOf(gpa);
  }
  unmapSingle(_iova: Iova, _length: number, _direction: DmaDirection): void {}

  mapSg(list: readonly DmaBuffer[], _direction: DmaDirection): DmaSegment[] {
    return list.map(({ gpa, length }) => ({ iova: iovaOf(gpa), length }));
  }
  unmapSg(_list: readonly DmaSegment[], _direction: DmaDirection): void {}

  allocCoherent(length: number): { gpa: Gpa; iova: Iova } {
    const gpa = this.#pages.allocate(nrFrames(0, length));
    if (gpa === undefined) throw new DmaMapFailed("no-memory");
    return { gpa, iova: iovaOf(gpa) };
  }
  freeCoherent(gpa: Gpa, _iova: Iova, length: number): void {
    this.#pages.free(gpa, nrFrames(0, length));
  }

  syncForCpu(_iova: Iova, _length: number, _direction: DmaDirection): void {}
  syncForDevice(_iova: Iova, _length: number, _direction: DmaDirection): void {}
}

const iovaOf = (gpa: number): Iova => gpa as Iova;

/** Who asks the host. Throws DmaMapFailed unless every frame is seen pinned; the caller has counted them up. */
export interface PinRequester {
  pin(endpoint: Bdf, ranges: Iterable<FrameRange>): void;
}

export interface TrackedDmaOptions {
  readonly direct: DmaApi;
  readonly units: TrackingUnits;
  readonly requests: PinRequester;
  readonly endpoint: Bdf;
  readonly counters: DriverCounters;
}

/**
 * The DMA API of a tracked function: dma-direct does the mapping, and the table counts the frames of the address that
 * the device gets. The same steps in the same order as guest/linux/dma_ops.c.
 *
 * A mapping is all or nothing: when a frame cannot be pinned, its counts are taken back, and the caller may retry.
 */
export class TrackedDma implements DmaApi {
  readonly #direct: DmaApi;
  readonly #units: TrackingUnits;
  readonly #requests: PinRequester;
  readonly #endpoint: Bdf;
  readonly #counters: DriverCounters;

  constructor(options: TrackedDmaOptions) {
    this.#direct = options.direct;
    this.#units = options.units;
    this.#requests = options.requests;
    this.#endpoint = options.endpoint;
    this.#counters = options.counters;
  }

  mapSingle(gpa: Gpa, length: number, direction: DmaDirection): Iova {
    const iova = this.#direct.mapSingle(gpa, length, direction);
    try {
      this.#track(iova, length, direction);
    } catch (error) {
      this.#direct.unmapSingle(iova, length, direction);
      throw error;
    }
    return iova;
  }

  unmapSingle(iova: Iova, length: number, direction: DmaDirection): void {
    this.#untrack(iova, length, direction);
    this.#direct.unmapSingle(iova, length, direction);
  }

  mapSg(list: readonly DmaBuffer[], direction: DmaDirection): DmaSegment[] {
    const segments = this.#direct.mapSg(list, direction);
    try {
      this.#trackSg(segments, direction);
    } catch (error) {
      this.#direct.unmapSg(segments, direction);
      throw error;
    }
    return segments;
  }

  unmapSg(list: readonly DmaSegment[], direction: DmaDirection): void {
    const done = this.#putSg(list, list.length, writes(direction));
    this.#counters.unmap++;
    this.#counters.framesUnmapped += done;
    this.#direct.unmapSg(list, direction);
  }

  allocCoherent(length: number): { gpa: Gpa; iova: Iova } {
    const memory = this.#direct.allocCoherent(length);
    try {
      this.#track(memory.iova, wholeFrames(length), "bidirectional");
    } catch (error) {
      this.#direct.freeCoherent(memory.gpa, memory.iova, length);
      throw error;
    }
    this.#counters.alloc++;
    return memory;
  }

  freeCoherent(gpa: Gpa, iova: Iova, length: number): void {
    this.#untrack(iova, wholeFrames(length), "bidirectional");
    this.#counters.free++;
    this.#direct.freeCoherent(gpa, iova, length);
  }

  syncForCpu(iova: Iova, length: number, direction: DmaDirection): void {
    this.#counters.sync++;
    this.#direct.syncForCpu(iova, length, direction);
  }

  syncForDevice(iova: Iova, length: number, direction: DmaDirection): void {
    this.#counters.sync++;
    this.#direct.syncForDevice(iova, length, direction);
  }

  #track(iova: number, length: number, direction: DmaDirection): void {
    const gfn = gfnOf(iova);
    const nr = nrFrames(iova, length);
    const found = this.#units.get(gfn, nr, writes(direction));
    if (found === "ask") {
      try {
        this.#requests.pin(this.#endpoint, [[gfn, nr]]);
      } catch (error) {
        this.#put(gfn, nr, false);
        throw this.#failed(error);
      }
    } else if (found !== "pinned") throw this.#failed(new DmaMapFailed(found));
    this.#counters.map++;
    this.#counters.framesMapped += nr;
  }

  #trackSg(list: readonly DmaSegment[], direction: DmaDirection): void {
    let asking = false;
    let frames = 0;
    for (const [i, { iova, length }] of list.entries()) {
      const nr = nrFrames(iova, length);
      const found = this.#units.get(gfnOf(iova), nr, writes(direction));
      if (found === "no-unit" || found === "saturated") {
        this.#putSg(list, i, false);
        throw this.#failed(new DmaMapFailed(found));
      }
      asking ||= found === "ask";
      frames += nr;
    }
    if (asking)
      try {
        this.#requests.pin(this.#endpoint, list.map(rangeOf));
      } catch (error) {
        this.#putSg(list, list.length, false);
        throw this.#failed(error);
      }
    this.#counters.map++;
    this.#counters.framesMapped += frames;
  }

  #untrack(iova: number, length: number, direction: DmaDirection): void {
    const done = this.#put(gfnOf(iova), nrFrames(iova, length), writes(direction));
    this.#counters.unmap++;
    this.#counters.framesUnmapped += done;
  }

  /** `written`: the device had the addresses, and might write. */
  #putSg(list: readonly DmaSegment[], count: number, written: boolean): number {
    let done = 0;
    for (let i = 0; i < count; i++) {
      const [gfn, nr] = rangeOf(list[i]!);
      done += this.#put(gfn, nr, written);
    }
    return done;
  }

  #put(gfn: number, nr: number, written: boolean): number {
    const done = this.#units.put(gfn, nr, written);
    this.#counters.underflow += nr - done;
    return done;
  }

  #failed(error: unknown): unknown {
    if (!(error instanceof DmaMapFailed)) return error;
    const counters = this.#counters;
    counters.mapFailed++;
    if (error.reason === "no-unit") counters.noUnit++;
    else if (error.reason === "saturated") counters.saturated++;
    else counters.pinRefused++;
    return error;
  }
}

const writes = (direction: DmaDirection): boolean => direction !== "to-device";
const wholeFrames = (length: number): number => nrFrames(0, length) * FRAME_SIZE;
/** The frames of a segment. */
export const rangeOf = ({ iova, length }: DmaSegment): FrameRange => [gfnOf(iova), nrFrames(iova, length)];
