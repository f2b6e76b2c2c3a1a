import { wordsOf } from "../wire/struct.ts";
import {
  containerInfo,
  DmaMap,
  DmaUnmap,
  Type1Info,
  VFIO_CHECK_EXTENSION,
  VFIO_DMA_MAP_FLAG_READ,
  VFIO_DMA_MAP_FLAG_WRITE,
  VFIO_DMA_UNMAP_FLAG_ALL,
  VFIO_IOMMU_GET_INFO,
  VFIO_IOMMU_MAP_DMA,
  VFIO_IOMMU_UNMAP_DMA,
  VFIO_UNMAP_ALL,
} from "../wire/vfio-type1.ts";
import { type Ioctl, KernelStruct, ioctl as systemIoctl } from "./ioctl.ts";
import { IommuPinner, type IovaLimits, type IovaSpace } from "./iommu-pinner.ts";
import { pointerAt, setPages, setPointer } from "./libc.ts";

const MAP = wordsOf(DmaMap);
const UNMAP = wordsOf(DmaUnmap);

/**
 * Pins through a VFIO container whose IOMMU is set (type 1, version 2), which stays its owner's. The kernel counts them
 * in VmLck, and allows `dma_entry_limit` mappings for each container, whatever their lengths.
 */
export class VfioPinner extends IommuPinner {
  /** Throws HostError; EINVAL where the IOMMU has no pages of 4 KiB. */
  constructor({ container, ioctl = systemIoctl }: { container: number; ioctl?: Ioctl }) {
    super(new Type1(container, ioctl));
  }
}

class Type1 implements IovaSpace {
  readonly name = "vfio";
  readonly kernelSource = "VmLck";
  readonly mapCall = "VFIO_IOMMU_MAP_DMA";
  readonly roomIs = "the module parameter dma_entry_limit of vfio_iommu_type1";
  readonly #container: number;
  readonly #ioctl: Ioctl;
  readonly #map = new KernelStruct(
    DmaMap.encode({ argsz: DmaMap.size, flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE }),
  );
  readonly #unmap = new KernelStruct(DmaUnmap.encode({ argsz: DmaUnmap.size }));

  constructor(container: number, ioctl: Ioctl) {
    this.#container = container;
    this.#ioctl = ioctl;
  }

  /** Asked again where the answer has more capabilities than there was room for. */
  limits(): IovaLimits {
    for (let room = 1024; ; ) {
      const info = Type1Info.encode({ argsz: room }, room - Type1Info.size);
      this.#ioctl(this.#container, "VFIO_IOMMU_GET_INFO", VFIO_IOMMU_GET_INFO, info);
      const { argsz } = Type1Info.read(info);
      if (argsz <= room) {
        const { ranges, dmaAvail, smallestPage } = containerInfo(info);
        return { ranges, room: dmaAvail, smallestPage };
      }
      room = Math.ceil(argsz / 8) * 8;
    }
  }

  map(address: number, gfn: number, pages: number): void {
    const { words } = this.#map;
    setPointer(words, MAP.vaddr, address);
    setPages(words, MAP.iova, gfn);
    setPages(words, MAP.size, pages);
    this.#ioctl(this.#container, this.mapCall, VFIO_IOMMU_MAP_DMA, this.#map);
  }

  unmap(gfn: number, pages: number): number {
    return this.#unmapDma(0, gfn, pages);
  }

  unmapAll(): number | undefined {
    const has = this.#ioctl(this.#container, "VFIO_CHECK_EXTENSION", VFIO_CHECK_EXTENSION, VFIO_UNMAP_ALL);
    return has === 0 ? undefined : this.#unmapDma(VFIO_DMA_UNMAP_FLAG_ALL, 0, 0);
  }

  #unmapDma(flags: number, gfn: number, pages: number): number {
    const { words } = this.#unmap;
    words[UNMAP.flags] = flags;
    setPages(words, UNMAP.iova, gfn);
    setPages(words, UNMAP.size, pages);
    this.#ioctl(this.#container, "VFIO_IOMMU_UNMAP_DMA", VFIO_IOMMU_UNMAP_DMA, this.#unmap);
    return pointerAt(words, UNMAP.size);
  }
}
