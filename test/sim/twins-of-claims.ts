/** What tells of frames that are claimed and never transferred, broken in one place. */
import type { Gfn } from "../../src/base/units.ts";
import type { DmaAccess } from "../../src/memory/guest-memory.ts";
import type { SharedWords } from "../../src/memory/shared-words.ts";
import { CheckedTracker } from "../../src/sim/backend.ts";
import type { TrackingCounters } from "../../src/tracking/counters.ts";
import { DeviceGate, type IommuTable, SoftwareIommu } from "../../src/tracking/software-iommu.ts";
import type { BrokenTwin } from "./twins.ts";

const UNTOLD = /claimed frames were never transferred/;

/** Lets through what it should, and clears no mark. */
class BlindGate extends DeviceGate {
  override translate(page: number, access: DmaAccess): ReturnType<DeviceGate["translate"]> {
    return this.allows(page, access) ? (page as Gfn) : super.translate(page, access);
  }
}

/** Clears marks by load and store. */
class TornGate extends DeviceGate {
  constructor(table: IommuTable, device: number, ring: () => void) {
    const words = table as SharedWords;
    super(table, device, ring);
    words.and = (index, bits) => {
      const seen = words.load(index);
      words.store(index, seen & bits);
      return seen;
    };
  }
}

class UnmarkedIommu extends SoftwareIommu {
  override allow(gfn: Gfn): void {
    super.allow(gfn, false);
  }
}

/** Leaves the mark of before on what is pinned unasked. */
class StaleIommu extends SoftwareIommu {
  override allow(gfn: Gfn, unused?: boolean): void {
    super.allow(gfn, unused || undefined);
  }
}

/** Takes every pinned frame for a claimed one when a device has faulted. */
class GreedyTracker extends CheckedTracker {
  readonly told: TrackingCounters;
  constructor(...args: ConstructorParameters<typeof CheckedTracker>) {
    super(...args);
    this.told = args[0].counters;
  }
  override touched(gfn: Gfn, device: number): boolean {
    const granted = super.touched(gfn, device);
    this.told.framesClaimed = this.pinned;
    return granted;
  }
}

export const claimTwins: Readonly<Record<string, BrokenTwin>> = {
  "a gate that does not tell of DMA": {
    twin: { makeGate: (...args) => new BlindGate(...args) },
    found: UNTOLD,
  },
  "a gate that tells of DMA by load and store": {
    twin: { makeGate: (...args) => new TornGate(...args) },
    found: /never transferred|the IOMMU (allows|forbids)|DMA fault|DMA to frame/,
  },
  "a host that counts what a device faulted on as claimed": {
    twin: { backend: { makeTracker: (...args) => new GreedyTracker(...args) } },
    found: /^the guest has claimed/,
    settings: { faultCapable: true, hostile: false },
  },
  "a pin of a claimed frame that is not marked": {
    twin: { backend: { makeIommu: (...args) => new UnmarkedIommu(...args) } },
    found: UNTOLD,
    settings: { selfish: true },
  },
  "a frame that is pinned for a fault with the mark of before": {
    twin: { backend: { makeIommu: (...args) => new StaleIommu(...args) } },
    found: UNTOLD,
    settings: { selfish: true, faultCapable: true, hostile: false },
  },
};
