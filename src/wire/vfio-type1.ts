/**
 * VFIO's type 1 IOMMU, version 2: ioctls of a container. Linux include/uapi/linux/vfio.h (6.1); each number is
 * _IO(';', 100 + n) there. The first field of every structure is its size.
 */
import { le16, le32, le64, le64bits, struct } from "./struct.ts";

export const VFIO_CHECK_EXTENSION = 0x3b65;
export const VFIO_IOMMU_GET_INFO = 0x3b70;
export const VFIO_IOMMU_MAP_DMA = 0x3b71;
export const VFIO_IOMMU_UNMAP_DMA = 0x3b72;

/** Of CHECK_EXTENSION: an UNMAP_DMA may unmap all (Linux 5.12). */
export const VFIO_UNMAP_ALL = 9;

export const VFIO_DMA_MAP_FLAG_READ = 1;
export const VFIO_DMA_MAP_FLAG_WRITE = 2;

export const DmaMap = struct("vfio_iommu_type1_dma_map", 32, {
  argsz: le32(0),
  flags: le32(4),
  /** Of this process. */
  vaddr: le64(8),
  iova: le64(16),
  size: le64(24),
});

/** With this flag IOVA and size are 0. */
export const VFIO_DMA_UNMAP_FLAG_ALL = 2;

export const DmaUnmap = struct("vfio_iommu_type1_dma_unmap", 24, {
  argsz: le32(0),
  flags: le32(4),
  iova: le64(8),
  /** The kernel answers how many bytes it has unmapped. */
  size: le64(16),
});

export const VFIO_IOMMU_INFO_PGSIZES = 1;
export const VFIO_IOMMU_INFO_CAPS = 2;

/** Where `argsz` has no room for all capabilities, the kernel answers the size that has, and no offset. */
export const Type1Info = struct("vfio_iommu_type1_info", 24, {
  argsz: le32(0),
  flags: le32(4),
  /** One bit for each size of page that the IOMMU has. */
  iovaPgsizes: le64bits(8),
  /** From the beginning; 0: there are none. */
  capOffset: le32(16),
  padding: le32(20),
});
export const InfoCapHeader = struct("vfio_info_cap_header", 8, {
  id: le16(0),
  version: le16(2),
  /** From the beginning of the info; 0: the last one. */
  next: le32(4),
});

export const VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE = 1;
export const VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL = 3;

/** Followed by `nrIovas` ranges. */
export const IovaRangesCap = struct("vfio_iommu_type1_info_cap_iova_range", 16, {
  header: le64bits(0),
  nrIovas: le32(8),
  reserved: le32(12),
});
/** Inclusive: a range ends at …fff. iommufd's iommu_iova_range is the same. */
export const IovaRange = struct("vfio_iova_range", 16, { start: le64(0), last: le64(8) });

export const DmaAvailCap = struct("vfio_iommu_type1_info_dma_avail", 12, {
  header: le64bits(0),
  avail: le32(8),
});

/** What GET_INFO says of a container. */
export interface ContainerInfo {
  /** In bytes. */
  readonly smallestPage: number;
  /** Start and last byte of what can be mapped, in pairs, ascending; undefined where the kernel does not say (before 5.4). */
  readonly ranges: Float64Array | undefined;
  /** Mappings that it has room for; undefined where the kernel does not say (before 5.11). */
  readonly dmaAvail: number | undefined;
}

/** The kernel's answer, of which `info` has all. */
export function containerInfo(info: Uint8Array): ContainerInfo {
  const { flags, iovaPgsizes, capOffset } = Type1Info.read(info);
  const smallestPage = flags & VFIO_IOMMU_INFO_PGSIZES ? Number(iovaPgsizes & -iovaPgsizes) : 4096;
  let ranges: Float64Array | undefined;
  let dmaAvail: number | undefined;
  let at = flags & VFIO_IOMMU_INFO_CAPS ? capOffset : 0;
  while (at !== 0) {
    const { id, next } = InfoCapHeader.read(info, at);
    if (id === VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE)
      ranges = iovaRanges(info, at + IovaRangesCap.size, IovaRangesCap.read(info, at).nrIovas);
    else if (id === VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL) dmaAvail = DmaAvailCap.read(info, at).avail;
    at = next;
  }
  return { smallestPage, ranges, dmaAvail };
}

/** `count` ranges from `at` on, as start and last byte in pairs. */
export function iovaRanges(from: Uint8Array, at: number, count: number): Float64Array {
  const ranges = new Float64Array(2 * count);
  for (let i = 0; i < count; i++) {
    const { start, last } = IovaRange.read(from, at + i * IovaRange.size);
    ranges.set([start, last], 2 * i);
  }
  return ranges;
}
