import { DmaFault, type Errno, HostError, NotGuestRam } from "../base/errors.ts";
import type { Iova } from "../base/units.ts";
import type { GuestAccess } from "../memory/guest-memory.ts";
import {
  NVME_CMD_FLUSH,
  NVME_CMD_READ,
  NVME_CMD_WRITE,
  NVME_CONTROL_FUA,
  NVME_DATA_TRANSFER_ERROR,
  NVME_FLAGS_FUSE,
  NVME_FLAGS_PSDT,
  NVME_INTERNAL_ERROR,
  NVME_INVALID_FIELD,
  NVME_INVALID_NAMESPACE,
  NVME_INVALID_OPCODE,
  NVME_LBA_OUT_OF_RANGE,
  NVME_NSID_ALL,
  NVME_PRP_OFFSET_INVALID,
  NVME_SUCCESS,
  NVME_UNRECOVERED_READ_ERROR,
  NVME_WRITE_FAULT,
  NvmeCommand,
  NvmeCompletion,
  packStatus,
} from "../wire/nvme.ts";
import { SECTOR_SIZE } from "../wire/virtio-blk.ts";
import type { BlockStore } from "./block-store.ts";
import type { DeviceCounters } from "./counters.ts";
import { PrpOffsetInvalid, prpPieces } from "./prp.ts";

/** What Create I/O Completion Queue and Create I/O Submission Queue say. Both are contiguous. */
export interface NvmeQueueLayout {
  readonly submission: Iova;
  readonly completion: Iova;
  /** Entries of each. */
  readonly size: number;
}

interface Queue extends NvmeQueueLayout {
  submissionHead: number;
  submissionTail: number;
  completionHead: number;
  completionTail: number;
  phase: number;
  /** Executed, but not posted yet. */
  done: { readonly cid: number; readonly status: number; readonly again: boolean } | undefined;
  /** The rings are not guest RAM: nothing more is served. */
  broken: boolean;
}

type Command = ReturnType<typeof NvmeCommand.read>;
type Outcome = { readonly status: number; readonly again: boolean };

/** MDTS 10 in units of 4 KiB: no more in one command. */
export const NVME_TRANSFER_MAX = 2 ** 22;
const NAMESPACE = 1;
const final = (status: number): Outcome => ({ status, again: false });
const retryable = (status: number): Outcome => ({ status, again: true });

/**
 * The I/O queue pairs of an NVMe controller with one namespace of 512-byte blocks. A command is executed when it is
 * fetched, and completed in that order. A ring that the IOMMU forbids loses nothing: what was fetched is kept, and
 * comes first in the next run.
 */
export class NvmeController {
  /** How often the host refused, by reason; the guest sees a media error. */
  readonly hostErrors = new Map<Errno, number>();
  readonly #memory: GuestAccess;
  readonly #store: BlockStore;
  readonly #counters: DeviceCounters;
  readonly #queues = new Map<number, Queue>();
  readonly #entry = new Uint8Array(NvmeCommand.size);
  /** Where the next run begins, so that a busy queue does not starve the others. */
  #turn = 0;

  constructor(memory: GuestAccess, store: BlockStore, counters: DeviceCounters) {
    this.#memory = memory;
    this.#store = store;
    this.#counters = counters;
  }

  createQueue(id: number, layout: NvmeQueueLayout): void {
    const start = { submissionHead: 0, submissionTail: 0, completionHead: 0, completionTail: 0 };
    this.#queues.set(id, { ...layout, ...start, phase: 1, done: undefined, broken: false });
  }

  deleteQueue(id: number): void {
    this.#queues.delete(id);
  }

  /** The Submission Queue `id` Tail Doorbell is written. */
  submit(id: number, tail: number): void {
    const q = this.#queues.get(id);
    // Invalid Doorbell Write Value (Base, section 5.2): out of range, or more than the queue has room for.
    if (!q || !valid(q.size, tail) || distance(q.size, q.submissionHead, tail) < waiting(q))
      this.#counters.errors++;
    else q.submissionTail = tail;
  }

  /** The Completion Queue `id` Head Doorbell is written. */
  complete(id: number, head: number): void {
    const q = this.#queues.get(id);
    // The same: takes entries off an empty queue.
    if (!q || !valid(q.size, head) || distance(q.size, q.completionHead, head) > posted(q))
      this.#counters.errors++;
    else q.completionHead = head;
  }

  /** Complete at most `limit` commands, queue by queue in turn. `more`: the limit was reached. */
  run(limit: number): { completed: number; more: boolean } {
    const queues = [...this.#queues];
    let completed = 0;
    let idle = 0;
    for (let i = this.#turn; completed < limit && idle < queues.length; i++) {
      const [id, queue] = queues[i % queues.length]!;
      this.#turn = (i + 1) % queues.length;
      if (this.#guarded(id, queue)) {
        completed++;
        idle = 0;
      } else idle++;
    }
    return { completed, more: completed === limit };
  }

  #guarded(id: number, q: Queue): boolean {
    try {
      return !q.broken && this.#step(id, q);
    } catch (error) {
      if (error instanceof DmaFault) this.#counters.faults++;
      else if (error instanceof NotGuestRam) {
        this.#counters.errors++;
        q.broken = true;
      } else throw error;
      return false;
    }
  }

  #step(id: number, q: Queue): boolean {
    // A queue is full with one entry less than its size (Base, section 3.3.1, "Full Queue").
    if (posted(q) === q.size - 1) return false;
    if (!q.done) {
      if (q.submissionHead === q.submissionTail) return false;
      this.#memory.read(q.submission + q.submissionHead * NvmeCommand.size, this.#entry);
      q.submissionHead = (q.submissionHead + 1) % q.size;
      const command = NvmeCommand.read(this.#entry);
      q.done = { cid: command.cid, ...this.#attempt(command) };
    }
    this.#post(id, q, q.done);
    q.done = undefined;
    this.#counters.requests++;
    return true;
  }

  #post(id: number, q: Queue, { cid, status, again }: NonNullable<Queue["done"]>): void {
    const at = q.completion + q.completionTail * NvmeCompletion.size;
    const entry = NvmeCompletion.encode({ sqHead: q.submissionHead, sqId: id, cid });
    const last = NvmeCompletion.fields.status.at;
    this.#memory.write(at, entry.subarray(0, last));
    // ORDERING: release, with the phase tag. PAIRS WITH the driver's load16 of it.
    this.#memory.store16(at + last, packStatus(status, again, q.phase));
    q.completionTail = (q.completionTail + 1) % q.size;
    if (q.completionTail === 0) q.phase ^= 1;
  }

  #attempt(command: Command): Outcome {
    try {
      return this.#execute(command);
    } catch (error) {
      if (error instanceof DmaFault) {
        this.#counters.faults++;
        return retryable(NVME_DATA_TRANSFER_ERROR);
      }
      if (error instanceof HostError) {
        this.hostErrors.set(error.errno, (this.hostErrors.get(error.errno) ?? 0) + 1);
        return this.#refuse(retryable(mediaError(command.opcode)));
      }
      if (error instanceof PrpOffsetInvalid) return this.#refuse(final(NVME_PRP_OFFSET_INVALID));
      if (error instanceof NotGuestRam) return this.#refuse(final(NVME_DATA_TRANSFER_ERROR));
      throw error;
    }
  }

  #refuse(outcome: Outcome): Outcome {
    this.#counters.errors++;
    return outcome;
  }

  #execute(command: Command): Outcome {
    const { opcode, flags, nsid } = command;
    if (opcode !== NVME_CMD_FLUSH && opcode !== NVME_CMD_WRITE && opcode !== NVME_CMD_READ)
      return this.#refuse(final(NVME_INVALID_OPCODE));
    // No fused operations, and PRPs only: PSDT 00b.
    if (flags & (NVME_FLAGS_FUSE | NVME_FLAGS_PSDT)) return this.#refuse(final(NVME_INVALID_FIELD));
    if (nsid !== NAMESPACE && !(opcode === NVME_CMD_FLUSH && nsid === NVME_NSID_ALL))
      return this.#refuse(final(NVME_INVALID_NAMESPACE));
    if (opcode === NVME_CMD_FLUSH) {
      this.#store.flush();
      return final(NVME_SUCCESS);
    }
    return this.#transfer(command);
  }

  #transfer({ opcode, slba, nlb, control, prp1, prp2 }: Command): Outcome {
    const blocks = nlb + 1;
    const length = blocks * SECTOR_SIZE;
    // What Base says of MDTS (section 5.17.2.1, Identify Controller).
    if (length > NVME_TRANSFER_MAX) return this.#refuse(final(NVME_INVALID_FIELD));
    if (slba + blocks > this.#store.sectors) return this.#refuse(final(NVME_LBA_OUT_OF_RANGE));
    let position = slba * SECTOR_SIZE;
    for (const { gpa, length: size } of prpPieces(this.#memory, prp1, prp2, length)) {
      const start = position;
      this.#memory.transfer(
        gpa,
        size,
        (piece, done) => {
          if (opcode === NVME_CMD_READ) this.#store.read(start + done, piece);
          else this.#store.write(start + done, piece);
        },
        opcode === NVME_CMD_READ ? "write" : "read",
      );
      position += size;
      this.#counters.transfers++;
      this.#counters.bytes += size;
    }
    if (opcode === NVME_CMD_WRITE && control & NVME_CONTROL_FUA) this.#store.flush();
    return final(NVME_SUCCESS);
  }
}

const distance = (size: number, from: number, to: number): number => (to - from + size) % size;
const posted = (q: Queue): number => distance(q.size, q.completionHead, q.completionTail);
const waiting = (q: Queue): number => distance(q.size, q.submissionHead, q.submissionTail);
const valid = (size: number, index: number): boolean => index >= 0 && index < size;

function mediaError(opcode: number): number {
  if (opcode === NVME_CMD_READ) return NVME_UNRECOVERED_READ_ERROR;
  return opcode === NVME_CMD_WRITE ? NVME_WRITE_FAULT : NVME_INTERNAL_ERROR;
}
