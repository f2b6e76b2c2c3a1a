import { FRAME_SIZE, type Gfn } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import type { Pinner } from "./pinner.ts";
import type { SoftwareIommu } from "./software-iommu.ts";

const EXTENT_BYTES = 256 * 2 ** 20;

/**
 * Everything pinned before the guest starts, in large extents, as a hypervisor does without coIOMMU. What the memory
 * map shows later (firmware uncovers RAM below 1 MiB) is added; what it hides again stays pinned.
 */
export class StaticPins {
  readonly #memory: GuestMemory;
  readonly #pinner: Pinner;
  readonly #iommu: SoftwareIommu;
  /** Pinned ranges of host addresses, as [start, end), disjoint. */
  #covered: (readonly [number, number])[] = [];
  #frames = 0;

  constructor(memory: GuestMemory, pinner: Pinner, iommu: SoftwareIommu) {
    this.#memory = memory;
    this.#pinner = pinner;
    this.#iommu = iommu;
  }

  get frames(): number {
    return this.#frames;
  }

  /** Pin all RAM that is not pinned yet; returns the number of frames. Throws HostError. */
  cover(): number {
    const before = this.#frames;
    for (const r of this.#memory.regions) {
      for (const [start, end] of this.#missing(r.hostAddress, r.hostAddress + r.size))
        this.#pin(start, end, r.gpa - r.hostAddress);
      const first = r.gpa / FRAME_SIZE;
      for (let gfn = first; gfn < first + r.size / FRAME_SIZE; gfn++) this.#iommu.allow(gfn as Gfn);
    }
    return this.#frames - before;
  }

  #pin(start: number, end: number, toGpa: number): void {
    for (let at = start; at < end; at += EXTENT_BYTES) {
      const length = Math.min(EXTENT_BYTES, end - at);
      this.#pinner.pinExtent(at, length, at + toGpa);
      this.#covered.push([at, at + length]);
      this.#frames += length / FRAME_SIZE;
    }
  }

  #missing(start: number, end: number): (readonly [number, number])[] {
    let missing: (readonly [number, number])[] = [[start, end]];
    for (const [from, to] of this.#covered)
      missing = missing.flatMap(([a, b]): (readonly [number, number])[] =>
        to <= a || b <= from
          ? [[a, b]]
          : (
              [
                [a, Math.min(b, from)],
                [Math.max(a, to), b],
              ] as const
            ).filter(([x, y]) => x < y),
      );
    return missing;
  }
}
