import type { Gfn } from "../base/units.ts";
import type { SoftwareIommu } from "./software-iommu.ts";

/**
 * What fault-capable devices have asked for in accesses that are under way. It stays pinned until they end: a device
 * asks for a frame at a time, and would not get all of them together while passes are frequent.
 */
export class OpenAccesses {
  readonly #iommu: SoftwareIommu;
  /** By device; of the access in which it last asked. */
  readonly #asked: { readonly access: number; readonly frames: Set<Gfn> }[] = [];

  constructor(iommu: SoftwareIommu) {
    this.#iommu = iommu;
  }

  granted(gfn: Gfn, device: number): void {
    const access = this.#iommu.access(device);
    if (this.#asked[device]?.access === access) this.#asked[device].frames.add(gfn);
    else this.#asked[device] = { access, frames: new Set([gfn]) };
  }

  holds(gfn: Gfn): boolean {
    return this.#asked.some(
      ({ access, frames }, device) => frames.has(gfn) && this.#iommu.access(device) === access,
    );
  }
}
