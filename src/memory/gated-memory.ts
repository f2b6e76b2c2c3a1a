import { DmaFault } from "../base/errors.ts";
import { type Gfn, gfnOf } from "../base/units.ts";
import type { GuestAccess, GuestMemory } from "./guest-memory.ts";

/** What an assigned device asks of its IOMMU; tracking/software-iommu.ts implements it. */
export interface DmaGate {
  /** Open a DMA window: frames that are allowed inside it stay pinned until leave(). */
  enter(): void;
  leave(): void;
  allows(gfn: Gfn): boolean;
  /**
   * Called outside a window for a frame that is not allowed: ask the host to pin it now. True iff it did. Only
   * before the guest's driver is active is that granted (abi.md section 4, "undecided").
   */
  request(gfn: Gfn): boolean;
}

/**
 * Guest memory as an assigned device reaches it: every access, rings and descriptors included, is checked frame by
 * frame against the IOMMU, and happens inside a DMA window or not at all.
 */
export class GatedMemory implements GuestAccess {
  readonly #memory: GuestMemory;
  readonly #gate: DmaGate;

  constructor(memory: GuestMemory, gate: DmaGate) {
    this.#memory = memory;
    this.#gate = gate;
  }

  read(gpa: number, into: Uint8Array): void {
    this.#window(gpa, into.length, () => this.#memory.read(gpa, into));
  }
  write(gpa: number, from: Uint8Array): void {
    this.#window(gpa, from.length, () => this.#memory.write(gpa, from));
  }
  load16(gpa: number): number {
    return this.#window(gpa, 2, () => this.#memory.load16(gpa));
  }
  store16(gpa: number, value: number): void {
    this.#window(gpa, 2, () => this.#memory.store16(gpa, value));
  }
  transfer(gpa: number, length: number, each: (piece: Uint8Array, done: number) => void): void {
    this.#window(gpa, length, () => this.#memory.transfer(gpa, length, each));
  }

  #window<T>(gpa: number, length: number, access: () => T): T {
    const first = gfnOf(gpa);
    const last = gfnOf(gpa + Math.max(length, 1) - 1);
    // Each turn either succeeds, faults, or has one more frame pinned; the bound guards against a host that lies.
    for (let tries = 0; tries <= last - first + 1; tries++) {
      this.#gate.enter();
      let missing: Gfn | undefined;
      try {
        for (let gfn = first; gfn <= last; gfn++) {
          if (this.#gate.allows(gfn as Gfn)) continue;
          missing = gfn as Gfn;
          break;
        }
        if (missing === undefined) return access();
      } finally {
        this.#gate.leave();
      }
      if (!this.#gate.request(missing)) throw new DmaFault(missing * 4096);
    }
    throw new DmaFault(gpa);
  }
}
