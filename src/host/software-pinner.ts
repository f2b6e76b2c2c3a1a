import { HostError } from "../base/errors.ts";
import type { Pinner } from "../tracking/pinner.ts";
import { withoutMemory } from "./discarded.ts";
import { SlotTable } from "./slots.ts";

/** 2^28 handles: 1 TiB page by page. */
const GROUPS_MAX = 2 ** 14;

/** Handles without pins: where the software IOMMU alone keeps DMA away from frames that are not pinned. */
export class SoftwarePinner implements Pinner {
  readonly name = "software";
  readonly kernelSource = "none";
  readonly #one = new Int32Array(1);
  #slots = new SlotTable(GROUPS_MAX);

  pin(_addresses: Float64Array, count: number, handles: Int32Array): void {
    while (this.#slots.free < count) if (!this.#slots.grow()) throw new HostError("pin", "ENOSPC");
    this.#slots.take(count, handles);
  }

  pinExtent(): number {
    this.pin(new Float64Array(0), 1, this.#one);
    return this.#one[0]!;
  }

  release(handles: Int32Array, count: number): number {
    for (let i = 0; i < count; i++) this.#slots.give(handles[i]!);
    return count;
  }

  discarded(addresses: Float64Array, count: number, out: Uint8Array): void {
    withoutMemory(addresses, count, out);
  }

  kernelPinnedPages(): null {
    return null;
  }

  close(): void {
    this.#slots = new SlotTable(GROUPS_MAX);
  }
}
