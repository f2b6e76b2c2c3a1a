import { FRAME_SIZE } from "../../src/base/units.ts";
import type { Ioctl } from "../../src/host/ioctl.ts";
import {
  DmaMap,
  DmaUnmap,
  VFIO_DMA_UNMAP_FLAG_ALL,
  VFIO_IOMMU_MAP_DMA,
  VFIO_IOMMU_UNMAP_DMA,
} from "../../src/wire/vfio-type1.ts";
import { bytesOf } from "../support/fake-iommu.ts";

/** Frames that a container maps, going by the calls that it was sent and that succeeded. */
export class MappedFrames {
  readonly #frames = new Set<number>();
  maps = 0;
  unmaps = 0;

  get size(): number {
    return this.#frames.size;
  }

  has(gfn: number): boolean {
    return this.#frames.has(gfn);
  }

  /** `kernel`, with all that it is asked to map and unmap written down. */
  recording(kernel: Ioctl): Ioctl {
    return (fd, name, request, argument) => {
      if (typeof argument === "number") return kernel(fd, name, request, argument);
      const asked = bytesOf(argument).slice();
      const result = kernel(fd, name, request, argument);
      if (request === VFIO_IOMMU_MAP_DMA) this.#mapped(asked);
      else if (request === VFIO_IOMMU_UNMAP_DMA) this.#unmapped(asked);
      return result;
    };
  }

  #mapped(asked: Uint8Array): void {
    const { iova, size } = DmaMap.read(asked);
    this.maps++;
    for (let at = iova; at < iova + size; at += FRAME_SIZE) this.#frames.add(at / FRAME_SIZE);
  }

  #unmapped(asked: Uint8Array): void {
    const { flags, iova, size } = DmaUnmap.read(asked);
    this.unmaps++;
    if (flags & VFIO_DMA_UNMAP_FLAG_ALL) this.#frames.clear();
    for (let at = iova; at < iova + size; at += FRAME_SIZE) this.#frames.delete(at / FRAME_SIZE);
  }
}
