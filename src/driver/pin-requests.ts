import { type Bdf, milliseconds } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import type { QueueLayout } from "../virtio/queue.ts";
import {
  PinRange,
  ReqPin,
  ReqTail,
  VIRTIO_IOMMU_S_OK,
  VIRTIO_IOMMU_S_UNSUPP,
  VIRTIO_IOMMU_T_PIN,
} from "../wire/virtio-iommu.ts";
import {
  availOffset,
  Desc,
  descOffset,
  RingHead,
  UsedElem,
  usedOffset,
  VIRTQ_AVAIL_F_NO_INTERRUPT,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
} from "../wire/virtqueue.ts";
import type { DriverCounters } from "./counters.ts";
import type { Cpu } from "./cpu.ts";
import type { PinRequester } from "./dma.ts";
import { DmaMapFailed } from "./dma-api.ts";
import type { TrackingUnits } from "./units.ts";

/** A host that takes longer is taken for dead: the CPU spins all that time. */
const PIN_WAIT_MS = 5000;
/** Notifications get lost: QEMU 7.2 drops an access to an x-pci-proxy-dev while another CPU has one under way. */
const RENOTIFY_MS = 10;
/** No status of the standard: what the tail says until the device has answered. */
const STATUS_UNANSWERED = 0xff;

/** Words at the start of the page that requests are made in; CPUs share them. */
const LOCK = 0;
/** The device has said that PIN is on. */
const ON = 4;
/** It has not given the buffer back in time. */
const LOST = 8;
const TAIL = 32;
const REQUEST = 112;
/** Ranges that fit behind it: as many as in the page of guest/linux/pin.c. */
const BUFFER_RANGES = Math.floor((4096 - REQUEST - ReqPin.size) / PinRange.size);

export interface PinRequestsOptions {
  readonly memory: GuestMemory;
  readonly units: TrackingUnits;
  readonly cpu: Cpu;
  readonly counters: DriverCounters;
  /** GPA of the page that requests are made in, zeroed at first. */
  readonly page: number;
  readonly queue: QueueLayout;
  /** What the device accepts: pin_batch_max. */
  readonly rangesMax: number;
  notify(): void;
}

/** A frame range: [first GFN, number of frames]. */
export type FrameRange = readonly [gfn: number, nr: number];

/**
 * PIN requests, docs/abi.md section 3, as guest/linux/pin.c makes them: one at a time over all CPUs, and the answer is
 * polled for. All state is in guest memory, because CPUs share it; the queue's indices are those in its rings.
 */
export class PinRequests implements PinRequester {
  readonly #o: PinRequestsOptions;
  readonly #rangesMax: number;

  constructor(options: PinRequestsOptions) {
    this.#o = options;
    this.#rangesMax = Math.min(options.rangesMax, BUFFER_RANGES);
  }

  /** Before any CPU asks: the two descriptors that every request uses, and no interrupts. */
  setUp(): void {
    const { memory, queue, page } = this.#o;
    this.#describe(ReqPin.size);
    memory.write(
      queue.desc + descOffset(1),
      Desc.encode({ addr: page + TAIL, len: ReqTail.size, flags: VIRTQ_DESC_F_WRITE }),
    );
    memory.store16(queue.driver + RingHead.fields.flags.at, VIRTQ_AVAIL_F_NO_INTERRUPT);
  }

  /** After the device has been reset, so that a buffer that it had lost is the driver's again. */
  forgetLost(): void {
    this.#o.memory.store32(this.#o.page + LOST, 0);
  }

  /** Whether requests may be made. When it returns from turning them off, none is under way, unless lost. */
  enable(on: boolean): void {
    this.#locked(() => this.#o.memory.store32(this.#o.page + ON, on ? 1 : 0));
  }

  /**
   * Ask for those frames of `ranges` that are not pinned; the caller has counted them up. Neighbours are merged, and
   * all go into one request if they fit. Throws DmaMapFailed unless every frame is seen pinned.
   */
  pin(endpoint: Bdf, ranges: Iterable<FrameRange>): void {
    this.#locked(() => {
      this.#recover();
      const batch = new Batch();
      for (const [first, nr] of ranges) {
        this.#checkOn();
        for (let gfn = first; gfn < first + nr; gfn++) {
          if (this.#o.units.pinned(gfn) || batch.extend(gfn)) continue;
          if (batch.ranges.length === this.#rangesMax) this.#flush(endpoint, batch);
          batch.begin(gfn);
        }
      }
      this.#flush(endpoint, batch);
    });
  }

  #locked(action: () => void): void {
    const { memory, page, cpu } = this.#o;
    const take = () => memory.compareExchange32(page + LOCK, 0, 1) === 0;
    while (!cpu.waitFor(take, milliseconds(PIN_WAIT_MS)));
    try {
      action();
    } finally {
      memory.store32(page + LOCK, 0);
    }
  }

  #checkOn(): void {
    const { memory, page, counters } = this.#o;
    if (memory.load32(page + ON) && !memory.load32(page + LOST)) return;
    counters.pinOff++;
    throw new DmaMapFailed("off");
  }

  /**
   * A device that was late (its process was stopped, say) may have answered by now. That mapping has failed long
   * since; the buffer is the driver's again, and frames pinned for nothing are the host's to unpin.
   */
  #recover(): void {
    const { memory, page } = this.#o;
    if (memory.load32(page + LOST) && memory.load32(page + ON) && this.#answered()) this.forgetLost();
  }

  #flush(endpoint: Bdf, batch: Batch): void {
    const { units, counters } = this.#o;
    const ranges = batch.take();
    if (ranges.length === 0) return;
    const status = this.#exchange(endpoint, ranges);
    if (status !== VIRTIO_IOMMU_S_OK) throw new DmaMapFailed("refused", status);
    // The host says that it has set P in every frame; the mapping must see it before its device has the address.
    for (const { gfn, nrFrames } of ranges)
      for (let i = 0; i < nrFrames; i++)
        if (!units.pinned(gfn + i)) {
          counters.pinNotSeen++;
          throw new DmaMapFailed("not-seen");
        }
    counters.pinFrames += ranges.reduce((sum, r) => sum + r.nrFrames, 0);
  }

  /** Send a request and wait for its answer's status. Throws DmaMapFailed "lost". */
  #exchange(endpoint: Bdf, ranges: readonly { gfn: number; nrFrames: number }[]): number {
    const { memory, page, queue, counters } = this.#o;
    const request = ReqPin.encode(
      { type: VIRTIO_IOMMU_T_PIN, endpoint, nrRanges: ranges.length },
      ranges.length * PinRange.size,
    );
    ranges.forEach((range, i) => void PinRange.write(request, range, ReqPin.size + i * PinRange.size));
    memory.write(page + REQUEST, request);
    memory.write(page + TAIL, ReqTail.encode({ status: STATUS_UNANSWERED }));
    this.#describe(request.length);
    const available = memory.load16(queue.driver + RingHead.fields.idx.at);
    memory.store16(queue.driver + availOffset(available % queue.size), 0);
    // ORDERING: release; the request is seen before idx. PAIRS WITH SplitQueue.pop().
    memory.store16(queue.driver + RingHead.fields.idx.at, (available + 1) & 0xffff);
    counters.pinRequests++;
    if (!this.#awaitAnswer()) {
      // The buffer may be the device's still: leave it alone. See #recover().
      memory.store32(page + LOST, 1);
      counters.pinLost++;
      throw new DmaMapFailed("lost");
    }
    const element = new Uint8Array(UsedElem.size);
    memory.read(queue.device + usedOffset(available % queue.size), element);
    const tail = new Uint8Array(ReqTail.size);
    memory.read(page + TAIL, tail);
    // VIRTIO 1.2 section 5.13.6.2: a device that does not know a request writes nothing.
    return UsedElem.read(element).len < ReqTail.size ? VIRTIO_IOMMU_S_UNSUPP : ReqTail.read(tail).status;
  }

  #awaitAnswer(): boolean {
    for (let waited = 0; waited < PIN_WAIT_MS; waited += RENOTIFY_MS) {
      this.#o.notify();
      if (this.#o.cpu.waitFor(() => this.#answered(), milliseconds(RENOTIFY_MS))) return true;
    }
    return false;
  }

  /** ORDERING: acquire; what the device wrote before it is seen. PAIRS WITH SplitQueue.push(). */
  #answered(): boolean {
    const { memory, queue } = this.#o;
    const used = memory.load16(queue.device + RingHead.fields.idx.at);
    return used === memory.load16(queue.driver + RingHead.fields.idx.at);
  }

  #describe(length: number): void {
    const { memory, queue, page } = this.#o;
    const desc = { addr: page + REQUEST, len: length, flags: VIRTQ_DESC_F_NEXT, next: 1 };
    memory.write(queue.desc, Desc.encode(desc));
  }
}

/** The ranges of the request that is being built. */
class Batch {
  ranges: { gfn: number; nrFrames: number }[] = [];

  /** Whether `gfn` is in, or behind, the last range, and so needs no range of its own. */
  extend(gfn: number): boolean {
    const last = this.ranges.at(-1);
    if (!last || gfn < last.gfn || gfn > last.gfn + last.nrFrames) return false;
    if (gfn === last.gfn + last.nrFrames) last.nrFrames++; // else neighbours in a list share the frame
    return true;
  }

  begin(gfn: number): void {
    this.ranges.push({ gfn, nrFrames: 1 });
  }

  take(): { gfn: number; nrFrames: number }[] {
    const { ranges } = this;
    this.ranges = [];
    return ranges;
  }
}
