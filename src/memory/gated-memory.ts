import { DmaFault, NotGuestRam } from "../base/errors.ts";
import { FRAME_SIZE, type Gfn, gfnOf } from "../base/units.ts";
import type { DmaAccess, GuestAccess, GuestMemory } from "./guest-memory.ts";

/** An address that leads nowhere. */
export const NO_FRAME = -1;

/** What an assigned device asks of its IOMMU; tracking/software-iommu.ts implements it. */
export interface DmaGate {
  /** Open a DMA window: frames that are reached inside it stay pinned until leave(). */
  enter(): void;
  leave(): void;
  /** The frame behind a page of the device's address space, or NO_FRAME: the access must not happen. */
  translate(page: number, access: DmaAccess): Gfn | typeof NO_FRAME;
  /**
   * Called outside a window for a frame that is not pinned: ask the host to pin it now. True iff it did. Only to a
   * device in bypass is that granted: to a fault-capable one at any time, to others before the guest's driver is active
   * (abi.md section 4, "undecided").
   */
  request(gfn: Gfn): boolean;
  /** Told of an access that does not happen: translate() has just said so of `address`, and request() has not helped. */
  fault(address: number, access: DmaAccess): void;
  /** An access has ended, well or not, that had made requests; what they asked for has stayed pinned until now. */
  accessEnded?(): void;
}

/**
 * Guest memory as an assigned device reaches it: every access, rings and descriptors included, is translated page by
 * page by the IOMMU, and happens inside a DMA window, as a whole or not at all.
 */
export class GatedMemory implements GuestAccess {
  readonly #memory: GuestMemory;
  readonly #gate: DmaGate;

  constructor(memory: GuestMemory, gate: DmaGate) {
    this.#memory = memory;
    this.#gate = gate;
  }

  read(address: number, into: Uint8Array): void {
    this.#window(address, into.length, "read", (gpa, from, to) =>
      this.#memory.read(gpa, part(into, from, to)),
    );
  }
  write(address: number, from: Uint8Array): void {
    this.#window(address, from.length, "write", (gpa, start, end) =>
      this.#memory.write(gpa, part(from, start, end)),
    );
  }
  load16(address: number): number {
    return this.#window(address, 2, "read", (gpa) => this.#memory.load16(gpa));
  }
  store16(address: number, value: number): void {
    this.#window(address, 2, "write", (gpa) => this.#memory.store16(gpa, value));
  }
  transfer(
    address: number,
    length: number,
    each: (piece: Uint8Array, done: number) => void,
    access: DmaAccess,
  ): void {
    this.#window(address, length, access, (gpa, from, to) =>
      this.#memory.transfer(gpa, to - from, (piece, done) => each(piece, from + done)),
    );
  }

  /** Call `run` for each range of guest memory that [address, address + length) leads to. Returns what the last did. */
  #window<T>(
    address: number,
    length: number,
    access: DmaAccess,
    run: (gpa: number, from: number, to: number) => T,
  ): T {
    const first = gfnOf(address);
    const last = gfnOf(address + Math.max(length, 1) - 1);
    let asked = false;
    try {
      // Each turn either succeeds, faults, or has one more frame pinned: once each, and once more if the backend dies
      // meanwhile, because the next one does not know what was asked for. The bound guards against a host that lies.
      for (let tries = 0; tries <= 2 * (last - first + 1); tries++) {
        this.#gate.enter();
        let missing: number;
        try {
          let gfn: number = this.#gate.translate(first, access);
          // In bypass, and in one mapping of a domain, the pages follow each other in guest memory as well.
          const distance = gfn - first;
          let page: number = first;
          if (gfn !== NO_FRAME)
            while (++page <= last) {
              gfn = this.#gate.translate(page, access);
              if (gfn !== page + distance) break;
            }
          if (page > last) return run(address + distance * FRAME_SIZE, 0, length);
          if (gfn !== NO_FRAME) return this.#scattered(address, length, access, run);
          missing = page;
        } finally {
          this.#gate.leave();
        }
        asked = true;
        if (!this.#gate.request(missing as Gfn)) throw this.#fault(address, missing, access);
      }
      throw this.#fault(address, first, access);
    } finally {
      if (asked) this.#gate.accessEnded?.();
    }
  }

  #fault(address: number, page: number, access: DmaAccess): DmaFault {
    const first = Math.max(address, page * FRAME_SIZE);
    this.#gate.fault(first, access);
    return new DmaFault(first);
  }

  /** The same for pages that are apart in guest memory, inside the window. */
  #scattered<T>(
    address: number,
    length: number,
    access: DmaAccess,
    run: (gpa: number, from: number, to: number) => T,
  ): T {
    const pieces: { gpa: number; from: number; to: number }[] = [];
    for (let from = 0; from < length; ) {
      const page = gfnOf(address + from);
      const gfn = this.#gate.translate(page, access);
      if (gfn === NO_FRAME) throw this.#fault(address, page, access);
      const gpa = address + from + (gfn - page) * FRAME_SIZE;
      if (!this.#memory.find(gpa, 1)) throw new NotGuestRam(gpa, 1);
      const to = Math.min(length, (page + 1) * FRAME_SIZE - address);
      pieces.push({ gpa, from, to });
      from = to;
    }
    let result: T;
    for (const { gpa, from, to } of pieces) result = run(gpa, from, to);
    return result!;
  }
}

const part = (bytes: Uint8Array, from: number, to: number): Uint8Array =>
  to - from === bytes.length ? bytes : bytes.subarray(from, to);
