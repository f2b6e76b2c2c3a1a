import { NotGuestRam, ProtocolError } from "../base/errors.ts";
import type { Gpa } from "../base/units.ts";
import type { GuestAccess } from "../memory/guest-memory.ts";
import {
  availOffset,
  availRingSize,
  Desc,
  descOffset,
  descTableSize,
  QUEUE_SIZE_MAX,
  RingHead,
  UsedElem,
  usedOffset,
  usedRingSize,
  VIRTQ_AVAIL_F_NO_INTERRUPT,
  VIRTQ_DESC_F_INDIRECT,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
} from "../wire/virtqueue.ts";

/** Where the driver put a split queue; names as in VIRTIO 1.2 section 4.1.4.3. */
export interface QueueLayout {
  /** Descriptors; a power of two, at most 32,768. */
  readonly size: number;
  readonly desc: Gpa;
  readonly driver: Gpa;
  readonly device: Gpa;
}

export interface Buffer {
  readonly gpa: Gpa;
  readonly length: number;
}

/** A descriptor chain: device-readable buffers, then device-writable ones. */
export interface Chain {
  readonly head: number;
  readonly readable: readonly Buffer[];
  readonly writable: readonly Buffer[];
}

/** A chain that breaks the rules. It is consumed: answer it with `push(error.head, 0)`. */
export class MalformedChain extends ProtocolError {
  readonly head: number;
  constructor(head: number, why: string) {
    super(`descriptor chain ${head}: ${why}`);
    this.head = head;
  }
}

/** Write bytes into buffers from the first on. Returns how many: all, or as many as there is room for. */
export function scatter(memory: GuestAccess, buffers: readonly Buffer[], bytes: Uint8Array): number {
  let done = 0;
  for (const { gpa, length } of buffers) {
    memory.write(gpa, bytes.subarray(done, done + length));
    done = Math.min(bytes.length, done + length);
  }
  return done;
}

export const lengthOf = (buffers: readonly Buffer[]): number => buffers.reduce((sum, b) => sum + b.length, 0);

/**
 * Device side of a split virtqueue. Nothing in the ring is trusted: an index beyond the ring, a cycle, an indirect
 * table in an indirect table and a chain longer than the ring are refused, and every loop is bounded by the size.
 */
export class SplitQueue {
  readonly #memory: GuestAccess;
  readonly #layout: QueueLayout;
  readonly #indirect: boolean;
  readonly #element = new Uint8Array(Desc.size);
  #next: number;
  #used: number;

  /**
   * `next` is the index of the first available entry to serve: 0, or what an earlier device left off at.
   * Throws ProtocolError for a layout that VIRTIO 1.2 section 2.7 forbids.
   */
  constructor(memory: GuestAccess, layout: QueueLayout, options: { indirect?: boolean; next?: number } = {}) {
    const { size, desc, driver, device } = layout;
    if (size < 1 || size > QUEUE_SIZE_MAX || size & (size - 1))
      throw new ProtocolError(`queue size ${size} is not a power of two up to ${QUEUE_SIZE_MAX}`);
    if (desc % 16 || driver % 2 || device % 4) throw new ProtocolError("a queue part is not aligned");
    this.#memory = memory;
    this.#layout = layout;
    this.#indirect = options.indirect ?? false;
    this.#next = options.next ?? 0;
    this.#used = this.#next;
  }

  get size(): number {
    return this.#layout.size;
  }

  /** Index of the next available entry to serve, modulo 2^16. */
  get next(): number {
    return this.#next;
  }

  /** Bytes of each part of the queue, for checks of where it lies. */
  static extents(layout: QueueLayout): Buffer[] {
    return [
      { gpa: layout.desc, length: descTableSize(layout.size) },
      { gpa: layout.driver, length: availRingSize(layout.size) },
      { gpa: layout.device, length: usedRingSize(layout.size) },
    ];
  }

  /**
   * The next chain, or undefined when the driver has added none. Throws MalformedChain for a chain that is to be
   * answered with length 0, ProtocolError when the ring itself is broken (the device needs a reset), and what the
   * memory throws (NotGuestRam, DmaFault): then the entry stays and a later pop tries again.
   */
  pop(): Chain | undefined {
    const { size, driver } = this.#layout;
    // ORDERING: acquire; the entry and its descriptors, written before idx, are seen. PAIRS WITH virtio_wmb().
    const available = (this.#memory.load16(driver + RingHead.fields.idx.at) - this.#next) & 0xffff;
    if (available === 0) return undefined;
    if (available > size) throw new ProtocolError(`${available} available entries in a ring of ${size}`);
    const head = this.#memory.load16(driver + availOffset(this.#next % size));
    if (head >= size) throw new ProtocolError(`available head ${head} in a ring of ${size}`);
    try {
      const chain = this.#walk(head);
      this.#next = (this.#next + 1) & 0xffff;
      return chain;
    } catch (error) {
      if (error instanceof MalformedChain) this.#next = (this.#next + 1) & 0xffff;
      throw error;
    }
  }

  /** Give a chain back, with the number of bytes written to its writable buffers from the first on. */
  push(head: number, written: number): void {
    const { size, device } = this.#layout;
    const elem = UsedElem.encode({ id: head, len: written });
    this.#memory.write(device + usedOffset(this.#used % size), elem);
    const used = (this.#used + 1) & 0xffff;
    // ORDERING: release; the element is seen before idx. PAIRS WITH virtio_rmb() in the driver.
    this.#memory.store16(device + RingHead.fields.idx.at, used);
    this.#used = used;
  }

  /** Whether the driver wants to be interrupted for what was pushed. */
  needsInterrupt(): boolean {
    const flags = this.#memory.load16(this.#layout.driver + RingHead.fields.flags.at);
    return (flags & VIRTQ_AVAIL_F_NO_INTERRUPT) === 0;
  }

  #walk(head: number): Chain {
    const chain = { head, readable: [] as Buffer[], writable: [] as Buffer[] };
    let table: Buffer = { gpa: this.#layout.desc, length: descTableSize(this.#layout.size) };
    let index = head;
    let direct = true;
    // VIRTIO 1.2 section 2.7.5: a chain is at most as long as the queue; the count also ends a cycle.
    for (let ttl = this.#layout.size; ttl > 0; ttl--) {
      if (descOffset(index) >= table.length)
        throw new MalformedChain(head, `descriptor ${index} is out of range`);
      this.#readDescriptor(head, table, index, direct);
      const desc = Desc.read(this.#element);
      if (desc.flags & VIRTQ_DESC_F_INDIRECT) {
        // Section 2.7.5.3.1: one level, not together with NEXT; the flags of the referring descriptor say WRITE or not.
        if (!this.#indirect) throw new MalformedChain(head, "indirect descriptors were not negotiated");
        if (!direct) throw new MalformedChain(head, "an indirect table refers to an indirect table");
        if (desc.flags & VIRTQ_DESC_F_NEXT) throw new MalformedChain(head, "INDIRECT together with NEXT");
        if (desc.len === 0 || desc.len % Desc.size)
          throw new MalformedChain(head, `indirect table of ${desc.len} bytes`);
        table = { gpa: desc.addr as Gpa, length: desc.len };
        direct = false;
        index = 0;
        ttl++; // the referring descriptor is not a buffer; at most once per chain
        continue;
      }
      this.#append(chain, desc);
      if (!(desc.flags & VIRTQ_DESC_F_NEXT)) return chain;
      index = desc.next;
    }
    throw new MalformedChain(head, "longer than the ring, or a cycle");
  }

  #readDescriptor(head: number, table: Buffer, index: number, direct: boolean): void {
    try {
      this.#memory.read(table.gpa + descOffset(index), this.#element);
    } catch (error) {
      if (error instanceof NotGuestRam && !direct) throw new MalformedChain(head, error.message);
      throw error;
    }
  }

  #append(
    chain: { head: number; readable: Buffer[]; writable: Buffer[] },
    desc: { addr: number; len: number; flags: number },
  ) {
    const buffer: Buffer = { gpa: desc.addr as Gpa, length: desc.len };
    if (desc.flags & VIRTQ_DESC_F_WRITE) chain.writable.push(buffer);
    // Section 2.7.4.2: device-writable buffers come after all device-readable ones.
    else if (chain.writable.length)
      throw new MalformedChain(chain.head, "a readable buffer after a writable one");
    else chain.readable.push(buffer);
  }
}
