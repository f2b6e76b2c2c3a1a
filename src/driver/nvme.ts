import { invariant } from "../base/errors.ts";
import { NVME_CMD_FLUSH, NVME_CMD_READ, NVME_CMD_WRITE, NvmeCommand } from "../wire/nvme.ts";
import { type DmaApi, type DmaBuffer, type DmaDirection, DmaMapFailed, type DmaSegment } from "./dma-api.ts";
import { NvmeRings, type NvmeRingsOptions } from "./nvme-rings.ts";
import { type PrpList, PrpPool } from "./prp.ts";

export interface NvmeRequest {
  readonly kind: "read" | "write" | "flush";
  /** First block, of 512 bytes. */
  readonly block: number;
  /**
   * Empty for a flush, else whole blocks, no more than the controller's MDTS. Only the first may begin, at a multiple
   * of 4, and only the last end within a frame: what Linux calls the virtual boundary of the queue.
   */
  readonly buffers: readonly DmaBuffer[];
  /** Called from poll() when the buffers are unmapped; `status` as in wire/nvme.ts, 0 when all is well. */
  done(status: number): void;
}

export interface NvmeQueueOptions extends NvmeRingsOptions {
  /** Bytes of a block of the namespace; 512 if it is not given. Each request is a multiple of it, and so is its place. */
  readonly blockSize?: number;
}

interface Slot {
  readonly request: NvmeRequest;
  readonly list: PrpList;
  readonly segments: readonly DmaSegment[];
}

/** In which requests count. */
const BLOCK_SIZE = 512;
const OPCODES = { read: NVME_CMD_READ, write: NVME_CMD_WRITE, flush: NVME_CMD_FLUSH };
const DIRECTIONS: Record<NvmeRequest["kind"], DmaDirection> = {
  ...{ read: "from-device", write: "to-device", flush: "to-device" },
};

/**
 * One I/O queue pair. Requests wait in order; one whose buffers cannot be mapped stays the first, and is tried again
 * with every poll(). NVM Express Base Specification 2.0, section 3.3.1.
 */
export class NvmeQueue {
  readonly rings: NvmeRings;
  /** Attempts to map that failed. */
  mapFailures = 0;
  /** Completions of commands that are not in flight: a broken controller. */
  strays = 0;
  readonly #dma: DmaApi;
  readonly #blockSize: number;
  readonly #prps: PrpPool;
  readonly #waiting: NvmeRequest[] = [];
  /** By command identifier. */
  readonly #slots: (Slot | undefined)[];
  readonly #free: number[];

  /** Throws DmaMapFailed. */
  constructor(options: NvmeQueueOptions) {
    const { memory, dma, size, blockSize = BLOCK_SIZE } = options;
    this.#dma = dma;
    this.#blockSize = blockSize;
    this.rings = new NvmeRings(options);
    this.#prps = new PrpPool(memory, dma);
    this.#slots = new Array(size - 1);
    this.#free = Array.from({ length: size - 1 }, (_, i) => i);
  }

  /** Requests that are not done, those that wait for a mapping included. */
  get pending(): number {
    return this.#waiting.length + this.rings.size - 1 - this.#free.length;
  }

  submit(request: NvmeRequest): void {
    this.#waiting.push(request);
    this.#start();
  }

  /** Complete what the controller has done, and start what waits. Returns how many completed. */
  poll(): number {
    const completed = this.rings.poll(({ cid, status }) => this.#complete(cid, status));
    this.#start();
    return completed;
  }

  /** Nothing is pending, and the queue pair is deleted in the controller. */
  close(): void {
    invariant(this.pending === 0, "requests are pending");
    this.#prps.close();
    this.rings.free();
  }

  #complete(cid: number, status: number): void {
    const slot = this.#slots[cid];
    if (!slot) {
      this.strays++;
      return;
    }
    this.#slots[cid] = undefined;
    this.#free.push(cid);
    this.#unmap(slot);
    this.#prps.give(slot.list);
    slot.request.done(status);
  }

  #start(): void {
    while (this.#free.length > 0 && this.#waiting.length > 0) {
      const slot = this.#map(this.#waiting[0]!);
      if (!slot) break;
      this.#waiting.shift();
      const cid = this.#free.pop()!;
      this.#slots[cid] = slot;
      this.#write(cid, slot);
    }
    this.rings.tell();
  }

  #map(request: NvmeRequest): Slot | undefined {
    const dma = this.#dma;
    const { buffers } = request;
    const direction = DIRECTIONS[request.kind];
    let list: PrpList | undefined;
    try {
      list = this.#prps.take(buffers);
      const [only] = buffers;
      if (!only) return { request, list, segments: [] };
      if (buffers.length > 1) return { request, list, segments: dma.mapSg(buffers, direction) };
      const iova = dma.mapSingle(only.gpa, only.length, direction);
      return { request, list, segments: [{ iova, length: only.length }] };
    } catch (error) {
      if (list) this.#prps.give(list);
      if (!(error instanceof DmaMapFailed)) throw error;
      this.mapFailures++;
      return undefined;
    }
  }

  #unmap({ request, segments }: Slot): void {
    const dma = this.#dma;
    const direction = DIRECTIONS[request.kind];
    const [first] = segments;
    if (request.buffers.length > 1) dma.unmapSg(segments, direction);
    else if (first) dma.unmapSingle(first.iova, first.length, direction);
  }

  #write(cid: number, { request, list, segments }: Slot): void {
    const { kind, block } = request;
    const length = segments.reduce((sum, s) => sum + s.length, 0);
    const data = length > 0 && {
      ...this.#prps.fill(list, segments),
      slba: (block * BLOCK_SIZE) / this.#blockSize,
      nlb: length / this.#blockSize - 1,
    };
    this.rings.put(NvmeCommand.encode({ opcode: OPCODES[kind], cid, nsid: 1, ...data }));
  }
}
