import { invariant } from "../base/errors.ts";
import { FRAME_SIZE, type Gpa, type Iova } from "../base/units.ts";
import {
  GPU_COPY,
  GPU_DONE,
  GPU_LENGTH_MAX,
  GPU_PAGE_VALID,
  GpuCommand,
  GpuPage,
  gpuError,
} from "../wire/gpu.ts";
import type { DmaBuffer, DmaSegment } from "./dma-api.ts";
import { DescriptorRing, type RingOptions } from "./ring.ts";

/** ORDERING: the tail is a release write; commands and table entries before it are visible to the device first. */
export interface GpuPort {
  submit(tail: number): void;
}

export interface GpuOptions extends RingOptions {
  readonly port: GpuPort;
  /** Entries of the device's table of pages. */
  readonly pages: number;
}

/** A scatter list that the device sees as contiguous, from `page` of its table on. */
export interface GpuBinding {
  readonly page: number;
  readonly pages: number;
  readonly segments: readonly DmaSegment[];
}

export interface GpuCopy {
  /** Device addresses; at most GPU_LENGTH_MAX bytes. */
  readonly source: number;
  readonly target: number;
  readonly length: number;
  /** Called from poll(), in the order of copy(). An error of wire/gpu.ts, or 0. */
  done(error: number): void;
}

/** A graphics driver: large lists mapped for long, and copies within them. */
export class GpuDriver {
  readonly ring: DescriptorRing;
  readonly table: Iova;
  readonly pages: number;
  readonly #options: GpuOptions;
  readonly #tableGpa: Gpa;
  readonly #waiting: GpuCopy[] = [];
  readonly #given: GpuCopy[] = [];

  /** Throws DmaMapFailed. */
  constructor(options: GpuOptions) {
    this.#options = options;
    this.pages = options.pages;
    this.ring = new DescriptorRing(options, GpuCommand.size, GpuCommand.fields.status.at);
    try {
      const { gpa, iova } = options.dma.allocCoherent(options.pages * GpuPage.size);
      this.#tableGpa = gpa;
      this.table = iova;
    } catch (error) {
      this.ring.close();
      throw error;
    }
  }

  /** Copies that are not done. */
  get pending(): number {
    return this.#waiting.length + this.#given.length;
  }

  /** Map `list`, of whole frames, for the device. Throws DmaMapFailed, and has then changed nothing. */
  bind(page: number, list: readonly DmaBuffer[]): GpuBinding {
    const segments = this.#options.dma.mapSg(list, "bidirectional");
    const addresses = segments.flatMap(({ iova, length }) =>
      Array.from({ length: length / FRAME_SIZE }, (_, i) => iova + i * FRAME_SIZE),
    );
    this.#enter(page, addresses.length, (i) => addresses[i]! + GPU_PAGE_VALID);
    return { page, pages: addresses.length, segments };
  }

  /** No copy that uses the binding is pending. */
  unbind({ page, pages, segments }: GpuBinding): void {
    this.#enter(page, pages, () => 0);
    this.#options.dma.unmapSg(segments, "bidirectional");
  }

  copy(copy: GpuCopy): void {
    invariant(copy.length <= GPU_LENGTH_MAX, "a copy fits into a command");
    this.#waiting.push(copy);
    this.#start();
  }

  /** Returns how many copies are done. */
  poll(): number {
    let done = 0;
    for (; this.#given.length > 0; done++) {
      const status = this.ring.status();
      if (!(status & GPU_DONE)) break;
      this.ring.take();
      this.#given.shift()!.done(gpuError(status));
    }
    this.#start();
    return done;
  }

  /** Nothing is pending, and nothing is bound. */
  close(): void {
    invariant(this.pending === 0, "copies are pending");
    this.ring.close();
    this.#options.dma.freeCoherent(this.#tableGpa, this.table, this.pages * GpuPage.size);
  }

  #start(): void {
    const before = this.ring.tail;
    for (let next = this.#waiting[0]; next && this.ring.room > 0; next = this.#waiting[0]) {
      this.#waiting.shift();
      const { source, target, length } = next;
      this.ring.give(GpuCommand.encode({ opcode: GPU_COPY, length, source, target }));
      this.#given.push(next);
    }
    if (this.ring.tail !== before) this.#options.port.submit(this.ring.tail);
  }

  #enter(page: number, pages: number, entry: (i: number) => number): void {
    const raw = new Uint8Array(pages * GpuPage.size);
    for (let i = 0; i < pages; i++) GpuPage.write(raw, { entry: entry(i) }, i * GpuPage.size);
    this.#options.memory.write(this.#tableGpa + page * GpuPage.size, raw);
  }
}
