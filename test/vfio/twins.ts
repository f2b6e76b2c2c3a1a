import type { Gfn } from "../../src/base/units.ts";
import { type Ioctl, ioctl } from "../../src/host/ioctl.ts";
import { DmaTrackingTable, type Unit } from "../../src/tracking/dtt.ts";
import { TU_PINNED } from "../../src/wire/dtt.ts";
import {
  DmaMap,
  DmaUnmap,
  VFIO_DMA_UNMAP_FLAG_ALL,
  VFIO_IOMMU_MAP_DMA,
  VFIO_IOMMU_UNMAP_DMA,
} from "../../src/wire/vfio-type1.ts";
import { bytesOf } from "../support/fake-iommu.ts";
import { isData, type WorldOptions } from "./world.ts";

/** Releases data frames that are pinned, mapped or not. Not the queues': a function that is cut off proves nothing. */
class BlindTable extends DmaTrackingTable {
  readonly #data = new Set<Unit>();

  override walk(gfn: Gfn): Unit {
    const unit = super.walk(gfn);
    if (isData(gfn)) this.#data.add(unit);
    return unit;
  }

  override claimForUnpin(unit: Unit) {
    if (!this.#data.has(unit) || !(this.load(unit) & TU_PINNED)) return super.claimForUnpin(unit);
    this.clearPinned(unit);
    return "claimed";
  }
}

/**
 * A kernel that is not asked to unmap every eighth time, and says that it has. What it has kept goes when its place is
 * mapped again.
 */
function forgetful(): Ioctl {
  /** IOVA -> bytes. */
  const mapped = new Map<number, number>();
  const kept = new Map<number, number>();
  let unmaps = 0;
  const within = (of: Map<number, number>, iova: number, size: number) =>
    [...of].filter(([at, length]) => at < iova + size && at + length > iova);
  const unmap = (fd: number, iova: number, size: number) => {
    const request = DmaUnmap.encode({ argsz: DmaUnmap.size, iova, size });
    ioctl(fd, "VFIO_IOMMU_UNMAP_DMA", VFIO_IOMMU_UNMAP_DMA, request);
    kept.delete(iova);
  };
  return (fd, name, request, argument) => {
    if (typeof argument === "number") return ioctl(fd, name, request, argument);
    const bytes = bytesOf(argument);
    if (request === VFIO_IOMMU_MAP_DMA) {
      const { iova, size } = DmaMap.read(bytes);
      for (const [at, length] of within(kept, iova, size)) unmap(fd, at, length);
      mapped.set(iova, size);
    }
    if (request !== VFIO_IOMMU_UNMAP_DMA) return ioctl(fd, name, request, argument);
    const { flags, iova, size } = DmaUnmap.read(bytes);
    if (flags & VFIO_DMA_UNMAP_FLAG_ALL) {
      for (const [at, length] of kept) unmap(fd, at, length);
      return ioctl(fd, name, request, argument);
    }
    const going = within(mapped, iova, size);
    for (const [at] of going) mapped.delete(at);
    if (++unmaps % 8 === 0) for (const [at, length] of going) kept.set(at, length);
    else {
      ioctl(fd, name, request, argument);
      for (const [at] of within(kept, iova, size)) kept.delete(at); // in a hole
    }
    DmaUnmap.write(bytes, { size: going.reduce((sum, [, length]) => sum + length, 0) });
    return 0;
  };
}

/** What is broken on purpose; the oracles must catch each. */
export const twins: Record<string, () => Partial<WorldOptions>> = {
  "releases mapped frames": () => ({ openTable: (...args) => new BlindTable(...args) }),
  "forgets an UNMAP": () => ({ kernel: forgetful() }),
};
