import { invariant } from "../base/errors.ts";
import type { Gpa, Iova } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import {
  NVME_CMD_FLUSH,
  NVME_CMD_READ,
  NVME_CMD_WRITE,
  NvmeCommand,
  NvmeCompletion,
  phaseOf,
  statusOf,
} from "../wire/nvme.ts";
import { type DmaApi, type DmaBuffer, type DmaDirection, DmaMapFailed, type DmaSegment } from "./dma-api.ts";
import { type PrpList, PrpPool } from "./prp.ts";

/**
 * The doorbells. A real function has them at 1000h + 2 * queue * (4 << CAP.DSTRD), and the completion queue's behind
 * it (NVMe over PCIe Transport Specification 1.0, SQyTDBL and CQyHDBL).
 *
 * ORDERING: both are release writes; the entries below `tail` are visible to the controller before it sees `tail`.
 */
export interface NvmePort {
  submit(queue: number, tail: number): void;
  complete(queue: number, head: number): void;
}

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

export interface NvmeQueueOptions {
  readonly memory: GuestMemory;
  readonly dma: DmaApi;
  readonly port: NvmePort;
  readonly id: number;
  /** Entries of both rings; one less is in flight at most. */
  readonly size: number;
}

interface Slot {
  readonly request: NvmeRequest;
  readonly list: PrpList;
  readonly segments: readonly DmaSegment[];
}

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
  /** For Create I/O Submission Queue and Create I/O Completion Queue. */
  readonly submission: Iova;
  readonly completion: Iova;
  readonly size: number;
  /** Attempts to map that failed. */
  mapFailures = 0;
  /** Completions of commands that are not in flight: a broken controller. */
  strays = 0;
  readonly #options: NvmeQueueOptions;
  readonly #rings: readonly { gpa: Gpa; iova: Iova; length: number }[];
  readonly #prps: PrpPool;
  readonly #waiting: NvmeRequest[] = [];
  /** By command identifier. */
  readonly #slots: (Slot | undefined)[];
  readonly #free: number[];
  #tail = 0;
  #head = 0;
  #phase = 1;

  /** Throws DmaMapFailed. */
  constructor(options: NvmeQueueOptions) {
    const { memory, dma, size } = options;
    this.#options = options;
    this.size = size;
    const lengths = [size * NvmeCommand.size, size * NvmeCompletion.size];
    const rings: { gpa: Gpa; iova: Iova; length: number }[] = [];
    this.#rings = rings;
    try {
      for (const length of lengths) rings.push({ ...dma.allocCoherent(length), length });
    } catch (error) {
      this.#freeRings();
      throw error;
    }
    this.submission = rings[0]!.iova;
    this.completion = rings[1]!.iova;
    this.#prps = new PrpPool(memory, dma);
    this.#slots = new Array(size - 1);
    this.#free = Array.from({ length: size - 1 }, (_, i) => i);
  }

  /** Requests that are not done, those that wait for a mapping included. */
  get pending(): number {
    return this.#waiting.length + this.size - 1 - this.#free.length;
  }

  submit(request: NvmeRequest): void {
    this.#waiting.push(request);
    this.#start();
  }

  /** Complete what the controller has done, and start what waits. Returns how many completed. */
  poll(): number {
    const { memory, port, id } = this.#options;
    let completed = 0;
    while (completed < this.size - 1) {
      const at = this.#rings[1]!.gpa + this.#head * NvmeCompletion.size;
      // ORDERING: acquire; the rest of the entry is read after its phase tag.
      const field = memory.load16(at + NvmeCompletion.fields.status.at);
      if (phaseOf(field) !== this.#phase) break;
      const raw = new Uint8Array(NvmeCompletion.size);
      memory.read(at, raw);
      this.#head = (this.#head + 1) % this.size;
      if (this.#head === 0) this.#phase ^= 1;
      this.#complete(NvmeCompletion.read(raw).cid, statusOf(field));
      completed++;
    }
    if (completed > 0) port.complete(id, this.#head);
    this.#start();
    return completed;
  }

  /** Nothing is pending, and the queue pair is deleted in the controller. */
  close(): void {
    invariant(this.pending === 0, "requests are pending");
    this.#prps.close();
    this.#freeRings();
  }

  #freeRings(): void {
    for (const { gpa, iova, length } of this.#rings) this.#options.dma.freeCoherent(gpa, iova, length);
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
    const before = this.#tail;
    while (this.#free.length > 0 && this.#waiting.length > 0) {
      const slot = this.#map(this.#waiting[0]!);
      if (!slot) break;
      this.#waiting.shift();
      const cid = this.#free.pop()!;
      this.#slots[cid] = slot;
      this.#write(cid, slot);
    }
    if (this.#tail !== before) this.#options.port.submit(this.#options.id, this.#tail);
  }

  #map(request: NvmeRequest): Slot | undefined {
    const { dma } = this.#options;
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
    const { dma } = this.#options;
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
      slba: block,
      nlb: length / BLOCK_SIZE - 1,
    };
    const entry = NvmeCommand.encode({ opcode: OPCODES[kind], cid, nsid: 1, ...data });
    this.#options.memory.write(this.#rings[0]!.gpa + this.#tail * NvmeCommand.size, entry);
    this.#tail = (this.#tail + 1) % this.size;
  }
}
