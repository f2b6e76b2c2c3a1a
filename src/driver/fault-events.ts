import { invariant } from "../base/errors.ts";
import { FRAME_SIZE, type Gpa } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import { layoutAt } from "../virtio/driver-queue.ts";
import type { QueueLayout } from "../virtio/queue.ts";
import { putUint } from "../wire/struct.ts";
import {
  Fault,
  VIRTIO_IOMMU_FAULT_F_ADDRESS,
  VIRTIO_IOMMU_FAULT_F_READ,
  VIRTIO_IOMMU_FAULT_F_WRITE,
  VIRTIO_IOMMU_FAULT_R_MAPPING,
  VIRTIO_IOMMU_FAULT_R_UNKNOWN,
} from "../wire/virtio-iommu.ts";
import {
  availOffset,
  Desc,
  descOffset,
  RingHead,
  UsedElem,
  usedOffset,
  usedRingSize,
  VIRTQ_AVAIL_F_NO_INTERRUPT,
  VIRTQ_DESC_F_WRITE,
} from "../wire/virtqueue.ts";
import type { DriverCounters } from "./counters.ts";

/** A DMA fault, as the device tells of it. */
export interface FaultReport {
  readonly endpoint: number;
  /** VIRTIO_IOMMU_FAULT_R_*. */
  readonly reason: number;
  readonly reads: boolean;
  readonly writes: boolean;
  /** Undefined when the device does not know. */
  readonly address: number | undefined;
}

/** Buffers at most: behind the queue they fill a page. */
const EVENTS_MAX = 64;
const buffersAt = ({ device, size }: QueueLayout): number => Math.ceil((device + usedRingSize(size)) / 8) * 8;
invariant(
  buffersAt(layoutAt(0, EVENTS_MAX)) + EVENTS_MAX * Fault.size <= FRAME_SIZE,
  `${EVENTS_MAX} event buffers do not fit into a page`,
);

/** The event queue in a page. `offered`: the device's size; a driver may use less, VIRTIO 1.2 section 4.1.4.3.2. */
export const eventQueueAt = (page: Gpa, offered: number): QueueLayout =>
  layoutAt(page, Math.min(offered, EVENTS_MAX));

export interface FaultEventsOptions {
  readonly memory: GuestMemory;
  readonly counters: DriverCounters;
  /** From eventQueueAt(). */
  readonly queue: QueueLayout;
  /** Told of each report, when its buffer is the device's again. */
  readonly faulted?: (report: FaultReport) => void;
  notify(): void;
}

/**
 * Takes fault reports from the event queue, VIRTIO 1.2 section 5.13.6.9, as guest/linux/faults.c does. Each buffer is
 * the device's, but while it is looked at: so the rings hold all state. One CPU at a time looks.
 */
export class FaultEvents {
  readonly #o: FaultEventsOptions;

  constructor(options: FaultEventsOptions) {
    this.#o = options;
  }

  /** Before the device is ready: an empty queue, all buffers of which are the device's, and no interrupts. */
  setUp(): void {
    const { queue } = this.#o;
    const page = new Uint8Array(FRAME_SIZE);
    for (let i = 0; i < queue.size; i++) {
      const desc = { addr: buffersAt(queue) + i * Fault.size, len: Fault.size, flags: VIRTQ_DESC_F_WRITE };
      Desc.write(page, desc, descOffset(i));
      putUint(page, queue.driver - queue.desc + availOffset(i), 2, BigInt(i));
    }
    const head = { flags: VIRTQ_AVAIL_F_NO_INTERRUPT, idx: queue.size };
    RingHead.write(page, head, queue.driver - queue.desc);
    this.#o.memory.write(queue.desc, page);
  }

  /** Take what is there, and give the buffers back. */
  poll(): void {
    if (this.drain()) this.#o.notify();
  }

  /** The same of a device that has been reset: it is not to be notified. Returns whether anything was there. */
  drain(): boolean {
    const { counters, faulted, queue } = this.#o;
    let taken = 0;
    // Bounded: a device could report without end.
    for (; taken < queue.size; taken++) {
      const event = this.#next();
      if (event === undefined) break;
      const report = event.length < Fault.size ? undefined : parse(event);
      counters[report ? "faults" : "badEvents"]++;
      if (report) faulted?.(report);
    }
    return taken > 0;
  }

  /** A copy of the next event, of which the buffer is the device's again; empty when it is too short for a report. */
  #next(): Uint8Array | undefined {
    const { memory, queue } = this.#o;
    const available = memory.load16(queue.driver + RingHead.fields.idx.at);
    const seen = (available - queue.size) & 0xffff;
    // ORDERING: acquire; what the device wrote before idx is seen. PAIRS WITH SplitQueue.push().
    if (memory.load16(queue.device + RingHead.fields.idx.at) === seen) return undefined;
    const element = new Uint8Array(UsedElem.size);
    memory.read(queue.device + usedOffset(seen % queue.size), element);
    const { id, len } = UsedElem.read(element);
    // A device that gives back what is none of its buffers gets one for it: at worst its own reports meet in one.
    const buffer = id % queue.size;
    const event = new Uint8Array(id < queue.size && len >= Fault.size ? Fault.size : 0);
    memory.read(buffersAt(queue) + buffer * Fault.size, event);
    memory.store16(queue.driver + availOffset(available % queue.size), buffer);
    // ORDERING: release; the event has been read, and the entry is seen before idx. PAIRS WITH SplitQueue.pop().
    memory.store16(queue.driver + RingHead.fields.idx.at, (available + 1) & 0xffff);
    return event;
  }
}

/** Undefined for what the driver has to ignore: "If the reserved field is not zero". */
function parse(event: Uint8Array): FaultReport | undefined {
  const { reason, reserved, flags, endpoint, address } = Fault.read(event);
  if (reserved.some((byte) => byte !== 0)) return undefined;
  return {
    endpoint,
    // "If the driver doesn't recognize reason, it SHOULD treat the fault as if it was VIRTIO_IOMMU_FAULT_R_UNKNOWN."
    reason: reason <= VIRTIO_IOMMU_FAULT_R_MAPPING ? reason : VIRTIO_IOMMU_FAULT_R_UNKNOWN,
    reads: (flags & VIRTIO_IOMMU_FAULT_F_READ) !== 0,
    writes: (flags & VIRTIO_IOMMU_FAULT_F_WRITE) !== 0,
    address: flags & VIRTIO_IOMMU_FAULT_F_ADDRESS ? address : undefined,
  };
}
