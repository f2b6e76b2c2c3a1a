import type { Gpa, Iova } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import { NvmeCommand, NvmeCompletion, phaseOf, statusOf } from "../wire/nvme.ts";
import type { DmaApi } from "./dma-api.ts";

/**
 * The doorbells. A real function has them at nvmeDoorbell() of wire/nvme-admin.ts.
 *
 * ORDERING: both are release writes; the entries below `tail` are visible to the controller before it sees `tail`.
 */
export interface NvmePort {
  submit(queue: number, tail: number): void;
  complete(queue: number, head: number): void;
}

export interface NvmeRingsOptions {
  readonly memory: GuestMemory;
  readonly dma: DmaApi;
  readonly port: NvmePort;
  readonly id: number;
  /** Entries of both rings; one less is in flight at most. */
  readonly size: number;
}

export interface NvmeDone {
  readonly cid: number;
  /** As in wire/nvme.ts. */
  readonly status: number;
  readonly dw0: number;
}

/**
 * A submission queue and its completion queue, in coherent memory. Who uses them never has more than `size` - 1 commands
 * in flight. NVM Express Base Specification 2.0, section 3.3.1.
 */
export class NvmeRings {
  /** For AQA, ASQ and ACQ, or for Create I/O Submission Queue and Create I/O Completion Queue. */
  readonly submission: Iova;
  readonly completion: Iova;
  readonly size: number;
  readonly #options: NvmeRingsOptions;
  readonly #rings: { gpa: Gpa; iova: Iova; length: number }[] = [];
  readonly #entry = new Uint8Array(NvmeCompletion.size);
  #tail = 0;
  /** The tail that the controller was told. */
  #told = 0;
  #head = 0;
  #phase = 1;

  /** Throws DmaMapFailed. */
  constructor(options: NvmeRingsOptions) {
    const { dma, size } = options;
    this.#options = options;
    this.size = size;
    try {
      for (const length of [size * NvmeCommand.size, size * NvmeCompletion.size])
        this.#rings.push({ ...dma.allocCoherent(length), length });
    } catch (error) {
      this.free();
      throw error;
    }
    this.submission = this.#rings[0]!.iova;
    this.completion = this.#rings[1]!.iova;
  }

  /** Write a command, of which the controller learns with tell(). */
  put(entry: Uint8Array): void {
    this.#options.memory.write(this.#rings[0]!.gpa + this.#tail * NvmeCommand.size, entry);
    this.#tail = (this.#tail + 1) % this.size;
  }

  tell(): void {
    if (this.#tail === this.#told) return;
    this.#told = this.#tail;
    this.#options.port.submit(this.#options.id, this.#tail);
  }

  /** Take what the controller has completed, at most all that can be in flight. Returns how many. */
  poll(each: (done: NvmeDone) => void): number {
    const { memory, port, id } = this.#options;
    let completed = 0;
    while (completed < this.size - 1) {
      const at = this.#rings[1]!.gpa + this.#head * NvmeCompletion.size;
      // ORDERING: acquire; the rest of the entry is read after its phase tag.
      const field = memory.load16(at + NvmeCompletion.fields.status.at);
      if (phaseOf(field) !== this.#phase) break;
      memory.read(at, this.#entry);
      this.#head = (this.#head + 1) % this.size;
      if (this.#head === 0) this.#phase ^= 1;
      const { cid, dw0 } = NvmeCompletion.read(this.#entry);
      each({ cid, status: statusOf(field), dw0 });
      completed++;
    }
    if (completed > 0) port.complete(id, this.#head);
    return completed;
  }

  /** The controller knows them no longer. */
  free(): void {
    for (const { gpa, iova, length } of this.#rings.splice(0))
      this.#options.dma.freeCoherent(gpa, iova, length);
  }
}
