import { invariant } from "../base/errors.ts";
import type { Gpa } from "../base/units.ts";
import type { GuestAccess } from "../memory/guest-memory.ts";
import {
  availOffset,
  availRingSize,
  Desc,
  descOffset,
  descTableSize,
  RingHead,
  UsedElem,
  usedOffset,
  usedRingSize,
  VIRTQ_DESC_F_INDIRECT,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
} from "../wire/virtqueue.ts";
import type { Buffer, QueueLayout } from "./queue.ts";

const align = (n: number, to: number) => Math.ceil(n / to) * to;

/** Lay a queue out at `gpa`, part after part; `bytes` is what it needs. */
export function layoutAt(gpa: number, size: number): QueueLayout & { readonly bytes: number } {
  const driver = gpa + descTableSize(size);
  const device = align(driver + availRingSize(size), 4);
  const bytes = align(device + usedRingSize(size), 4096) - gpa;
  return { size, desc: gpa as Gpa, driver: driver as Gpa, device: device as Gpa, bytes };
}

/** Driver side of a split virtqueue: what a guest does. Also the test tool for everything on the device side. */
export class DriverQueue {
  readonly #memory: GuestAccess;
  readonly #layout: QueueLayout;
  readonly #free: number[];
  readonly #chains = new Map<number, number[]>();
  #available: number;
  #seen: number;

  /** `next`: index of the first entry of both rings to use, as the device's. */
  constructor(memory: GuestAccess, layout: QueueLayout, next = 0) {
    this.#memory = memory;
    this.#layout = layout;
    this.#available = this.#seen = next;
    this.#free = Array.from({ length: layout.size }, (_, i) => layout.size - 1 - i);
  }

  /** Write a raw descriptor: for drivers that misbehave on purpose. */
  describe(index: number, desc: { addr: number; len: number; flags: number; next?: number }): void {
    this.#memory.write(this.#layout.desc + descOffset(index), Desc.encode(desc));
  }

  /** Offer a head to the device without building its chain. */
  offer(head: number): void {
    const { driver, size } = this.#layout;
    this.#memory.store16(driver + availOffset(this.#available % size), head);
    this.#available = (this.#available + 1) & 0xffff;
    // ORDERING: release; PAIRS WITH SplitQueue.pop().
    this.#memory.store16(driver + RingHead.fields.idx.at, this.#available);
  }

  /** Add a chain and offer it; returns its head. With `indirectAt`, the chain lies in a table at that GPA. */
  add(readable: readonly Buffer[], writable: readonly Buffer[], indirectAt?: number): number {
    const buffers = [
      ...readable.map((b) => ({ ...b, flags: 0 })),
      ...writable.map((b) => ({ ...b, flags: VIRTQ_DESC_F_WRITE })),
    ];
    const slots = Array.from({ length: indirectAt === undefined ? buffers.length : 1 }, () => this.#take());
    const head = slots[0]!;
    buffers.forEach(({ gpa, length, flags }, i) => {
      const last = i === buffers.length - 1;
      const next = indirectAt === undefined ? (slots[i + 1] ?? 0) : i + 1;
      const desc = {
        addr: gpa,
        len: length,
        flags: flags | (last ? 0 : VIRTQ_DESC_F_NEXT),
        next: last ? 0 : next,
      };
      if (indirectAt === undefined) this.describe(slots[i]!, desc);
      else this.#memory.write(indirectAt + descOffset(i), Desc.encode(desc));
    });
    if (indirectAt !== undefined)
      this.describe(head, {
        addr: indirectAt,
        len: buffers.length * Desc.size,
        flags: VIRTQ_DESC_F_INDIRECT,
      });
    this.#chains.set(head, slots);
    this.offer(head);
    return head;
  }

  /** The next chain that the device has given back. */
  poll(): { head: number; written: number } | undefined {
    const { device, size } = this.#layout;
    if (this.#memory.load16(device + RingHead.fields.idx.at) === this.#seen) return undefined;
    const raw = new Uint8Array(UsedElem.size);
    this.#memory.read(device + usedOffset(this.#seen % size), raw);
    this.#seen = (this.#seen + 1) & 0xffff;
    const { id, len } = UsedElem.read(raw);
    this.#free.push(...(this.#chains.get(id) ?? []));
    this.#chains.delete(id);
    return { head: id, written: len };
  }

  #take(): number {
    const slot = this.#free.pop();
    invariant(slot !== undefined, "the queue is full");
    return slot;
  }
}
