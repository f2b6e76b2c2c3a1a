import type { Clock } from "../base/clock.ts";
import { FRAME_SIZE, type Gpa, gfnOf, type Iova, milliseconds } from "../base/units.ts";
import { VIRTIO_IOMMU_MAP_F_READ, VIRTIO_IOMMU_MAP_F_WRITE } from "../wire/virtio-iommu.ts";
import type { DriverCounters } from "./counters.ts";
import { nrFrames } from "./dma.ts";
import {
  type DmaApi,
  type DmaBuffer,
  type DmaDirection,
  DmaMapFailed,
  type DmaSegment,
  type PageAllocator,
} from "./dma-api.ts";
import type { DomainRequests } from "./domain-requests.ts";

/** When unmapped addresses are taken from the device at last: as Linux's IOVA_FQ_SIZE and IOVA_FQ_TIMEOUT. */
const LAZY_MAX = 250;
const LAZY_TIME = milliseconds(10);

const FLAGS: Readonly<Record<DmaDirection, number>> = {
  "to-device": VIRTIO_IOMMU_MAP_F_READ,
  "from-device": VIRTIO_IOMMU_MAP_F_WRITE,
  bidirectional: VIRTIO_IOMMU_MAP_F_READ | VIRTIO_IOMMU_MAP_F_WRITE,
};

/** Pages of a domain's address space, of one CPU. */
export interface IovaAllocator {
  /** The first of `pages` pages in a row, or undefined. */
  take(pages: number): number | undefined;
  give(page: number, pages: number): void;
}

export interface RemappedDmaOptions {
  readonly requests: DomainRequests;
  readonly domain: number;
  readonly iovas: IovaAllocator;
  readonly pages: PageAllocator;
  readonly counters: DriverCounters;
  /** Unmapped addresses are taken from the device in batches; undefined: at once. */
  readonly lazy?: { readonly clock: Clock; readonly queue: LazyQueue };
}

interface Range {
  readonly page: number;
  readonly pages: number;
}

/** Addresses that the driver has unmapped, and the device may still use. All state is in one array, as plain numbers. */
export class LazyQueue {
  /** Number of ranges, when the first came, and the ranges: page and pages. */
  readonly words = new Float64Array(2 + 2 * LAZY_MAX);

  get size(): number {
    return this.words[0]!;
  }
  get ranges(): Range[] {
    return Array.from({ length: this.size }, (_, i) => ({
      page: this.words[2 + 2 * i]!,
      pages: this.words[3 + 2 * i]!,
    }));
  }

  isDue(now: number): boolean {
    return this.size === LAZY_MAX || (this.size > 0 && now - this.words[1]! >= LAZY_TIME);
  }

  push({ page, pages }: Range, now: number): void {
    if (this.size === 0) this.words[1] = now;
    this.words.set([page, pages], 2 + 2 * this.size);
    this.words[0]!++;
  }

  clear(): void {
    this.words[0] = 0;
  }
}

/**
 * The DMA API of a function that is attached to a domain, as Linux's dma-iommu: each mapping has addresses of its own,
 * which a MAP request makes valid and an UNMAP request takes back. An address that could not be taken back is not used
 * again.
 */
export class RemappedDma implements DmaApi {
  readonly #o: RemappedDmaOptions;

  constructor(options: RemappedDmaOptions) {
    this.#o = options;
  }

  mapSingle(gpa: Gpa, length: number, direction: DmaDirection): Iova {
    return this.mapSg([{ gpa, length }], direction)[0]!.iova;
  }

  unmapSingle(iova: Iova, length: number, direction: DmaDirection): void {
    this.unmapSg([{ iova, length }], direction);
  }

  /** One run of addresses, and a MAP request for each of its pieces that is one in guest memory. */
  mapSg(list: readonly DmaBuffer[], direction: DmaDirection): DmaSegment[] {
    if (list.length === 0) return [];
    const pages = pagesOf(list.map(({ gpa, length }) => ({ address: gpa, length })));
    const page = this.#o.iovas.take(pages);
    if (page === undefined) throw this.#failed(new DmaMapFailed("no-memory"));
    let at = page;
    const segments = list.map(({ gpa, length }) => {
      const iova = (at * FRAME_SIZE + (gpa % FRAME_SIZE)) as Iova;
      at += nrFrames(gpa, length);
      return { iova, length };
    });
    this.#map({ page, pages }, list, FLAGS[direction]);
    this.#o.counters.map++;
    this.#o.counters.framesMapped += pages;
    return segments;
  }

  unmapSg(list: readonly DmaSegment[], _direction: DmaDirection): void {
    if (list.length === 0) return;
    const pages = pagesOf(list.map(({ iova, length }) => ({ address: iova, length })));
    const range = { page: gfnOf(list[0]!.iova), pages };
    const { lazy } = this.#o;
    if (!lazy) this.#takeBack([range]);
    else {
      const now = lazy.clock.now();
      if (lazy.queue.isDue(now)) this.#flush(lazy.queue);
      lazy.queue.push(range, now);
    }
    this.#o.counters.unmap++;
    this.#o.counters.framesUnmapped += pages;
  }

  allocCoherent(length: number): { gpa: Gpa; iova: Iova } {
    const { pages, counters } = this.#o;
    const frames = nrFrames(0, length);
    const gpa = pages.allocate(frames);
    if (gpa === undefined) throw new DmaMapFailed("no-memory");
    try {
      const iova = this.mapSingle(gpa, frames * FRAME_SIZE, "bidirectional");
      counters.alloc++;
      return { gpa, iova };
    } catch (error) {
      pages.free(gpa, frames);
      throw error;
    }
  }

  freeCoherent(gpa: Gpa, iova: Iova, length: number): void {
    const frames = nrFrames(0, length);
    this.unmapSingle(iova, frames * FRAME_SIZE, "bidirectional");
    this.#o.counters.free++;
    this.#o.pages.free(gpa, frames);
  }

  syncForCpu(_iova: Iova, _length: number, _direction: DmaDirection): void {
    this.#o.counters.sync++;
  }
  syncForDevice(_iova: Iova, _length: number, _direction: DmaDirection): void {
    this.#o.counters.sync++;
  }

  /** To be called from time to time: take back what has waited long enough, or `all`. */
  tick(all = false): void {
    const { lazy } = this.#o;
    if (lazy && (all || lazy.queue.isDue(lazy.clock.now()))) this.#flush(lazy.queue);
  }

  #flush(queue: LazyQueue): void {
    this.#takeBack(queue.ranges);
    queue.clear();
  }

  /** Neighbours go in one request. What cannot be taken back stays out of use. */
  #takeBack(ranges: readonly Range[]): void {
    const { requests, domain, iovas, counters } = this.#o;
    const ascending = [...ranges].sort((a, b) => a.page - b.page);
    for (const [page, pages] of joined(ascending.map((r) => [r.page, r.pages])))
      try {
        requests.unmap(domain, page, pages);
        iovas.give(page, pages);
      } catch (error) {
        if (!(error instanceof DmaMapFailed)) throw error;
        counters.unmapFailed++;
      }
  }

  #map(range: Range, list: readonly DmaBuffer[], flags: number): void {
    const { requests, domain } = this.#o;
    let at = range.page;
    try {
      for (const [gfn, frames] of joined(list.map((b) => [gfnOf(b.gpa), nrFrames(b.gpa, b.length)]))) {
        requests.map(domain, at, gfn, frames, flags);
        at += frames;
      }
    } catch (error) {
      if (!(error instanceof DmaMapFailed)) throw error;
      // One that got no answer may be done all the same.
      if (at > range.page || error.reason === "lost") this.#takeBack([range]);
      else this.#o.iovas.give(range.page, range.pages);
      throw this.#failed(error);
    }
  }

  #failed(error: DmaMapFailed): DmaMapFailed {
    this.#o.counters.mapFailed++;
    return error;
  }
}

const pagesOf = (list: readonly { address: number; length: number }[]): number =>
  list.reduce((sum, { address, length }) => sum + nrFrames(address, length), 0);

/** Runs [first, count], with those that follow each other as one. */
function joined(
  runs: readonly (readonly [first: number, count: number])[],
): [first: number, count: number][] {
  const out: [number, number][] = [];
  for (const [first, count] of runs) {
    const last = out.at(-1);
    if (last && first === last[0] + last[1]) last[1] += count;
    else out.push([first, count]);
  }
  return out;
}
