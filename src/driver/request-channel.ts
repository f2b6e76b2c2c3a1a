import { milliseconds } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import type { QueueLayout } from "../virtio/queue.ts";
import { ReqTail, VIRTIO_IOMMU_S_UNSUPP } from "../wire/virtio-iommu.ts";
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
import { DmaMapFailed } from "./dma-api.ts";

/** A host that takes longer is taken for dead: the CPU spins all that time. */
const ANSWER_MS = 5000;
/** Notifications get lost: QEMU 7.2 drops an access to an x-pci-proxy-dev while another CPU has one under way. */
const RENOTIFY_MS = 10;
/** No status of the standard: what the tail says until the device has answered. */
const STATUS_UNANSWERED = 0xff;

/** Words at the start of the page that requests are made in; CPUs share them. */
const LOCK = 0;
/** Requests may be made. */
const ON = 4;
/** It has not given the buffer back in time. */
const LOST = 8;
const TAIL = 32;
const REQUEST = 112;
/** Bytes of a request. */
export const REQUEST_MAX = 4096 - REQUEST;

export interface RequestChannelOptions {
  readonly memory: GuestMemory;
  readonly cpu: Cpu;
  readonly counters: DriverCounters;
  /** GPA of the page that requests are made in, zeroed at first. */
  readonly page: number;
  readonly queue: QueueLayout;
  notify(): void;
}

/**
 * Requests to the virtio-iommu as guest/linux/pin.c makes them: one at a time over all CPUs, and the answer is polled
 * for. All state is in guest memory, because CPUs share it; the queue's indices are those in its rings.
 */
export class RequestChannel {
  protected readonly counters: DriverCounters;
  readonly #o: RequestChannelOptions;

  constructor(options: RequestChannelOptions) {
    this.#o = options;
    this.counters = options.counters;
  }

  /** Before any CPU asks: the two descriptors that every request uses, and no interrupts. */
  setUp(): void {
    const { memory, queue, page } = this.#o;
    this.#describe(0);
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
    this.locked(() => this.#o.memory.store32(this.#o.page + ON, on ? 1 : 0));
  }

  /** Requests are made inside only; `action` may be several. */
  protected locked<T>(action: () => T): T {
    const { memory, page, cpu } = this.#o;
    const take = () => memory.compareExchange32(page + LOCK, 0, 1) === 0;
    while (!cpu.waitFor(take, milliseconds(ANSWER_MS)));
    try {
      return action();
    } finally {
      memory.store32(page + LOCK, 0);
    }
  }

  /** Throws DmaMapFailed "off". */
  protected checkOn(): void {
    const { memory, page } = this.#o;
    if (memory.load32(page + ON) && !memory.load32(page + LOST)) return;
    this.counters.pinOff++;
    throw new DmaMapFailed("off");
  }

  /**
   * A device that was late (its process was stopped, say) may have answered by now. That request has failed long since;
   * the buffer is the driver's again, and frames pinned for nothing are the host's to unpin.
   */
  protected recover(): void {
    const { memory, page } = this.#o;
    if (memory.load32(page + LOST) && memory.load32(page + ON) && this.#answered()) this.forgetLost();
  }

  /** Send a request and wait for its answer's status. Throws DmaMapFailed "lost". */
  protected exchange(request: Uint8Array): number {
    const { memory, page, queue } = this.#o;
    memory.write(page + REQUEST, request);
    memory.write(page + TAIL, ReqTail.encode({ status: STATUS_UNANSWERED }));
    this.#describe(request.length);
    const available = memory.load16(queue.driver + RingHead.fields.idx.at);
    memory.store16(queue.driver + availOffset(available % queue.size), 0);
    // ORDERING: release; the request is seen before idx. PAIRS WITH SplitQueue.pop().
    memory.store16(queue.driver + RingHead.fields.idx.at, (available + 1) & 0xffff);
    if (!this.#awaitAnswer()) {
      // The buffer may be the device's still: leave it alone. See recover().
      memory.store32(page + LOST, 1);
      this.counters.pinLost++;
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
    for (let waited = 0; waited < ANSWER_MS; waited += RENOTIFY_MS) {
      this.counters.kicks++;
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
