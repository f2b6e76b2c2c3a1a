import { gfnOf, type Iova } from "../../src/base/units.ts";
import type { DmaDirection } from "../../src/driver/dma-api.ts";
import { RemappedDma, type RemappedDmaOptions } from "../../src/driver/remapped-dma.ts";
import { CheckedTracker } from "../../src/sim/backend.ts";
import { SoftwareIommu } from "../../src/tracking/software-iommu.ts";
import type { BrokenTwin } from "./twins.ts";

class StaleIommu extends SoftwareIommu {
  constructor(...args: ConstructorParameters<typeof SoftwareIommu>) {
    super(...args);
    this.tables.unmap = () => {};
  }
}

/** Lets go of nothing that domains mapped. */
class ClingingTracker extends CheckedTracker {
  override letGo(): void {}
}

/** Uses addresses again that are not taken back yet. */
class HastyDma extends RemappedDma {
  readonly iovas: RemappedDmaOptions["iovas"];
  constructor(options: RemappedDmaOptions) {
    super(options);
    this.iovas = options.iovas;
  }
  override unmapSingle(iova: Iova, length: number, direction: DmaDirection): void {
    this.iovas.give(gfnOf(iova), 1);
    super.unmapSingle(iova, length, direction);
  }
}

export const domainTwins: Readonly<Record<string, BrokenTwin>> = {
  "an UNMAP that leaves the device its translation": {
    twin: { backend: { makeIommu: (...args) => new StaleIommu(...args) } },
    found: /is free, and a device reaches it/,
  },
  "a host that keeps what domains do not map any more": {
    twin: { backend: { makeTracker: (...args) => new ClingingTracker(...args) } },
    found: /are idle and stay pinned/,
  },
  "a driver that uses addresses again before UNMAP": {
    twin: { remappedDma: (options) => new HastyDma(options) },
    found: /is free, and a device reaches it/,
  },
};
