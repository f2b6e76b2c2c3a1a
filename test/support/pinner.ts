import { HostError } from "../../src/base/errors.ts";
import type { Pinner } from "../../src/tracking/pinner.ts";

/** A host that pins in memory only, with faults: what the real pinners may do to the tracker. */
export class FakePinner implements Pinner {
  readonly name = "fake";
  readonly kernelSource = "none";
  /** Handle -> host address of the page. */
  readonly pages = new Map<number, number>();
  /** Host addresses of pages whose memory has been discarded since. */
  readonly holes = new Set<number>();
  readonly extents: { address: number; length: number }[] = [];
  /** Pages that may be pinned at once; a request beyond it fails at its first page too many. */
  pagesMax = Number.POSITIVE_INFINITY;
  /** errno of that failure. */
  errno = "ENOMEM";
  /** Releases that are granted before one is refused. */
  releasesMax = Number.POSITIVE_INFINITY;
  /** Called before each page is pinned or released. */
  before: (what: "pin" | "release") => void = () => {};
  #next = 0;

  isPinned(address: number): boolean {
    return [...this.pages.values()].includes(address);
  }

  pin(addresses: Float64Array, count: number, handles: Int32Array): void {
    for (let i = 0; i < count; i++) {
      this.before("pin");
      if (this.pages.size >= this.pagesMax) {
        for (let j = 0; j < i; j++) this.pages.delete(handles[j]!);
        throw new HostError("pin", this.errno);
      }
      handles[i] = this.#next++;
      this.pages.set(handles[i]!, addresses[i]!);
      this.holes.delete(addresses[i]!);
    }
  }

  pinExtent(address: number, length: number): number {
    if (this.extents.length >= this.pagesMax) throw new HostError("pin", this.errno);
    this.extents.push({ address, length });
    return this.#next++;
  }

  release(handles: Int32Array, count: number): number {
    for (let i = 0; i < count; i++) {
      this.before("release");
      if (this.releasesMax-- <= 0) return i;
      if (!this.pages.delete(handles[i]!)) throw new Error(`handle ${handles[i]} is released twice`);
    }
    return count;
  }

  discarded(addresses: Float64Array, count: number, out: Uint8Array): void {
    for (let i = 0; i < count; i++) out[i] = Number(this.holes.has(addresses[i]!));
  }

  kernelPinnedPages(): number {
    return this.pages.size;
  }

  close(): void {
    this.pages.clear();
  }
}
