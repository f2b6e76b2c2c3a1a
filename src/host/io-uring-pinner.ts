import { HostError, invariant } from "../base/errors.ts";
import type { Pinner } from "../tracking/pinner.ts";
import { withoutMemory } from "./discarded.ts";
import { BufferUpdate, closeRing, ioUringUnavailable, openRing, SLOTS_PER_RING } from "./io-uring.ts";
import { StatusField } from "./process-status.ts";
import { SLOTS_PER_GROUP, SlotTable } from "./slots.ts";

const PAGE_SIZE = 4096;
/** The kernel's limit for one registered buffer. */
const EXTENT_MAX = 2 ** 30;
/** 4,096 rings: 256 GiB pinned page by page, 134 million extents. Each ring costs one fd and 128 KiB of kernel memory. */
const RINGS_MAX = 4096;

/**
 * Long-term pins (FOLL_LONGTERM) without a device: every pinned page or extent is a registered buffer of an io_uring.
 * A handle is ring * 16384 + slot; neighbouring slots are filled and emptied by one call.
 *
 * The kernel charges pins to the memlock limit unless the process has CAP_IPC_LOCK (ENOMEM), and counts them in
 * VmPin: exactly for small pages; a page of a huge one counts as the whole huge page, once per ring.
 */
export class IoUringPinner implements Pinner {
  readonly name = "io_uring";
  readonly kernelSource = "VmPin";
  readonly #ringsMax: number;
  readonly #rings: number[] = [];
  #slots: SlotTable;
  readonly #fill = new BufferUpdate();
  /** All its buffers are empty, always. */
  readonly #clear = new BufferUpdate();
  readonly #vmPin = new StatusField("VmPin");
  readonly #one = new Int32Array(1);

  constructor(options: { ringsMax?: number } = {}) {
    invariant(SLOTS_PER_GROUP === SLOTS_PER_RING, "one group of slots per ring");
    this.#ringsMax = options.ringsMax ?? RINGS_MAX;
    this.#slots = new SlotTable(this.#ringsMax);
  }

  /** Why io_uring pins cannot be had here, as a clause for a person; undefined when they can. */
  static unavailable(): string | undefined {
    return ioUringUnavailable();
  }

  pin(addresses: Float64Array, count: number, handles: Int32Array, pages?: Int32Array): void {
    this.#take(count, handles);
    let pinned = 0;
    try {
      while (pinned < count) {
        const length = this.#runLength(handles, pinned, count);
        for (let i = pinned; i < pinned + length; i++)
          this.#fill.set(i - pinned, addresses[i]!, (pages?.[i] ?? 1) * PAGE_SIZE);
        // Where the host refuses a buffer, this call stops before it and the next one, starting at it, throws.
        pinned += this.#update(this.#fill, handles[pinned]!, length);
      }
    } catch (error) {
      const released = this.release(handles, pinned);
      invariant(released === pinned, `the kernel kept ${pinned - released} pins of a failed request`);
      for (let i = pinned; i < count; i++) this.#slots.give(handles[i]!);
      throw error;
    }
  }

  pinExtent(address: number, length: number): number {
    invariant(length > 0 && length <= EXTENT_MAX && length % PAGE_SIZE === 0, `extent of ${length} bytes`);
    this.#take(1, this.#one);
    const handle = this.#one[0]!;
    try {
      this.#fill.set(0, address, length);
      this.#update(this.#fill, handle, 1);
    } catch (error) {
      this.#slots.give(handle);
      throw error;
    }
    return handle;
  }

  release(handles: Int32Array, count: number): number {
    let released = 0;
    try {
      while (released < count) {
        const first = handles[released]!;
        const length = this.#runLength(handles, released, count);
        this.#slots.check(first, length);
        const done = this.#update(this.#clear, first, length);
        this.#slots.give(first, done);
        released += done;
      }
    } catch (error) {
      if (!(error instanceof HostError)) throw error;
    }
    return released;
  }

  discarded(addresses: Float64Array, count: number, out: Uint8Array): void {
    withoutMemory(addresses, count, out);
  }

  kernelPinnedPages(): number {
    return this.#vmPin.read() / (PAGE_SIZE / 1024);
  }

  close(): void {
    for (const ring of this.#rings.splice(0)) closeRing(ring);
    this.#slots = new SlotTable(this.#ringsMax);
    this.#vmPin.close();
  }

  /** Slots for `count` handles, on new rings where needed; nothing is taken when that fails. */
  #take(count: number, handles: Int32Array): void {
    while (this.#slots.free < count) {
      if (this.#rings.length === this.#ringsMax)
        throw new HostError("io_uring_setup", "ENOSPC", `all ${this.#ringsMax} rings are full`);
      this.#rings.push(openRing(SLOTS_PER_RING));
      this.#slots.grow();
    }
    this.#slots.take(count, handles);
  }

  /** Length of the run of consecutive slots of one ring that starts at handles[from]; at most what one call takes. */
  #runLength(handles: Int32Array, from: number, count: number): number {
    const first = handles[from]!;
    const limit = Math.min(count - from, this.#fill.capacity, SLOTS_PER_RING - (first % SLOTS_PER_RING));
    let length = 1;
    while (length < limit && handles[from + length] === first + length) length++;
    return length;
  }

  #update(update: BufferUpdate, handle: number, length: number): number {
    const ring = this.#rings[Math.floor(handle / SLOTS_PER_RING)]!;
    return update.run(ring, handle % SLOTS_PER_RING, length);
  }
}
