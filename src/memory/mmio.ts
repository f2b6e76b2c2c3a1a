import { invariant } from "../base/errors.ts";

/**
 * Registers of a PCI function that are mapped into this process, uncached. Every access is one of 32 bits, in the order
 * of the program.
 *
 * A load is Atomics.load: a plain MOV in V8. A store is not Atomics.store, which is an XCHG: that reads the register
 * first, and is a locked access to uncached memory, a bus lock, for which Linux may slow or end the process
 * (Documentation/arch/x86/buslock.rst). It is a plain store behind a full fence: ECMAScript does not tear it, as for each
 * integer of up to 32 bits, and no two of them can be joined, nor can one be moved before what was written until then.
 */
export class MmioRegisters {
  readonly #words: Int32Array;
  readonly #fence = new Int32Array(new SharedArrayBuffer(4));

  constructor(bytes: Uint8Array) {
    this.#words = new Int32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength >> 2);
  }

  /** Unsigned; `at` in bytes, a multiple of 4. */
  load32(at: number): number {
    return Atomics.load(this.#words, this.#index(at)) >>> 0;
  }

  /** ORDERING: release; the function sees what was written to memory before. */
  store32(at: number, value: number): void {
    const index = this.#index(at);
    Atomics.add(this.#fence, 0, 0);
    this.#words[index] = value;
  }

  #index(at: number): number {
    const index = at / 4;
    invariant(Number.isInteger(index) && index >= 0 && index < this.#words.length, `no register at ${at}`);
    return index;
  }
}
