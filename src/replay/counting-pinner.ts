import type { Pinner } from "../tracking/pinner.ts";

/** Pins of a host that is not there. */
export class CountingPinner implements Pinner {
  readonly name = "replay";
  readonly kernelSource = "none";
  #handles = 0;

  pin(_addresses: Float64Array, count: number, handles: Int32Array): void {
    for (let i = 0; i < count; i++) handles[i] = this.#next();
  }
  pinExtent(): number {
    return this.#next();
  }
  release(_handles: Int32Array, count: number): number {
    return count;
  }
  discarded(_addresses: Float64Array, count: number, out: Uint8Array): void {
    out.fill(0, 0, count);
  }
  kernelPinnedPages(): null {
    return null;
  }
  close(): void {}

  /** Handles are not used again before 2^31 pins. */
  #next(): number {
    this.#handles = (this.#handles + 1) % 2 ** 31;
    return this.#handles;
  }
}
