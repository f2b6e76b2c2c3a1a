import { HostError } from "../base/errors.ts";
import {
  IOMMU_IOAS_IOVA_RANGES,
  IOMMU_IOAS_MAP,
  IOMMU_IOAS_MAP_FIXED_IOVA,
  IOMMU_IOAS_MAP_READABLE,
  IOMMU_IOAS_MAP_WRITEABLE,
  IOMMU_IOAS_UNMAP,
  IoasIovaRanges,
  IoasMap,
  IoasUnmap,
} from "../wire/iommufd.ts";
import { wordsOf } from "../wire/struct.ts";
import { IovaRange, iovaRanges } from "../wire/vfio-type1.ts";
import { type Ioctl, KernelStruct, ioctl as systemIoctl } from "./ioctl.ts";
import { IommuPinner, type IovaLimits, type IovaSpace } from "./iommu-pinner.ts";
import { pointerAt, setPages, setPointer } from "./libc.ts";

const MAP = wordsOf(IoasMap);
const UNMAP = wordsOf(IoasUnmap);

/**
 * Pins through an I/O address space of iommufd, which stays its owner's, and to which a device has been attached: without
 * one the kernel would map, and pin nothing. It counts the pages in VmPin, and knows no limit of mappings.
 */
export class IommufdPinner extends IommuPinner {
  /** `ioas`: the ID of the address space. Throws HostError; EINVAL where its IOMMU has no pages of 4 KiB. */
  constructor({ iommufd, ioas, ioctl = systemIoctl }: { iommufd: number; ioas: number; ioctl?: Ioctl }) {
    super(new Ioas(iommufd, ioas, ioctl));
  }
}

class Ioas implements IovaSpace {
  readonly name = "iommufd";
  readonly kernelSource = "VmPin";
  readonly mapCall = "IOMMU_IOAS_MAP";
  readonly #iommufd: number;
  readonly #id: number;
  readonly #ioctl: Ioctl;
  readonly #map: KernelStruct;
  readonly #unmap: KernelStruct;

  constructor(iommufd: number, ioas: number, ioctl: Ioctl) {
    this.#iommufd = iommufd;
    this.#id = ioas;
    this.#ioctl = ioctl;
    const flags = IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_WRITEABLE | IOMMU_IOAS_MAP_READABLE;
    this.#map = new KernelStruct(IoasMap.encode({ size: IoasMap.size, flags, ioasId: ioas }));
    this.#unmap = new KernelStruct(IoasUnmap.encode({ size: IoasUnmap.size, ioasId: ioas }));
  }

  /** Asked again where there are more ranges than there was room for. */
  limits(): IovaLimits {
    for (let room = 64; ; ) {
      const asked = { size: IoasIovaRanges.size, ioasId: this.#id, numIovas: room };
      const query = IoasIovaRanges.encode(asked, room * IovaRange.size);
      const argument = new KernelStruct(query);
      const array = argument.address + IoasIovaRanges.size;
      IoasIovaRanges.write(query, { allowedIovas: array });
      try {
        // SAFETY: the array lies behind the structure in the same buffer, and has room for as many ranges.
        this.#ioctl(this.#iommufd, "IOMMU_IOAS_IOVA_RANGES", IOMMU_IOAS_IOVA_RANGES, argument);
      } catch (error) {
        if (!(error instanceof HostError) || error.errno !== "EMSGSIZE") throw error;
        room = IoasIovaRanges.read(query).numIovas;
        continue;
      }
      const { numIovas, outIovaAlignment } = IoasIovaRanges.read(query);
      const ranges = iovaRanges(query, IoasIovaRanges.size, numIovas);
      return { ranges, room: undefined, smallestPage: outIovaAlignment };
    }
  }

  map(address: number, gfn: number, pages: number): void {
    const { words } = this.#map;
    setPointer(words, MAP.userVa, address);
    setPages(words, MAP.length, pages);
    setPages(words, MAP.iova, gfn);
    this.#ioctl(this.#iommufd, this.mapCall, IOMMU_IOAS_MAP, this.#map);
  }

  unmap(gfn: number, pages: number): number {
    const { words } = this.#unmap;
    setPages(words, UNMAP.iova, gfn);
    setPages(words, UNMAP.length, pages);
    return this.#unmapIoas();
  }

  unmapAll(): number {
    const { words } = this.#unmap;
    setPages(words, UNMAP.iova, 0);
    words.fill(0xffff_ffff, UNMAP.length, UNMAP.length + 2);
    return this.#unmapIoas();
  }

  /** 0 where there is nothing, or a mapping would be split. */
  #unmapIoas(): number {
    try {
      this.#ioctl(this.#iommufd, "IOMMU_IOAS_UNMAP", IOMMU_IOAS_UNMAP, this.#unmap);
    } catch (error) {
      if (error instanceof HostError && error.errno === "ENOENT") return 0;
      throw error;
    }
    return pointerAt(this.#unmap.words, UNMAP.length);
  }
}
