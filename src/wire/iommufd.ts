/**
 * iommufd: ioctls of /dev/iommu, and those that join a VFIO device to it. Linux include/uapi/linux/iommufd.h and vfio.h
 * (6.12); each number is _IO(';', n) there. The first field of every structure is its size.
 */
import { le32, le32s, le64, struct } from "./struct.ts";

export const IOMMU_DESTROY = 0x3b80;
export const IOMMU_IOAS_ALLOC = 0x3b81;
export const IOMMU_IOAS_IOVA_RANGES = 0x3b84;
export const IOMMU_IOAS_MAP = 0x3b85;
export const IOMMU_IOAS_UNMAP = 0x3b86;

export const IommuDestroy = struct("iommu_destroy", 8, { size: le32(0), id: le32(4) });

/** An I/O address space: what is mapped in it is mapped for all devices that are attached to it. */
export const IoasAlloc = struct("iommu_ioas_alloc", 12, {
  size: le32(0),
  flags: le32(4),
  outIoasId: le32(8),
});

/** With room for too few ranges the call is EMSGSIZE, and `numIovas` the number that there are. */
export const IoasIovaRanges = struct("iommu_ioas_iova_ranges", 32, {
  size: le32(0),
  ioasId: le32(4),
  numIovas: le32(8),
  reserved: le32(12),
  /** Address of an array of VFIO's IovaRange. */
  allowedIovas: le64(16),
  /** Of the IOVA and of the length of every mapping, in bytes. */
  outIovaAlignment: le64(24),
});
export const IOMMU_IOAS_MAP_FIXED_IOVA = 1;
export const IOMMU_IOAS_MAP_WRITEABLE = 2;
export const IOMMU_IOAS_MAP_READABLE = 4;

export const IoasMap = struct("iommu_ioas_map", 40, {
  size: le32(0),
  flags: le32(4),
  ioasId: le32(8),
  reserved: le32(12),
  userVa: le64(16),
  length: le64(24),
  iova: le64(32),
});

/** IOVA 0 and a length of 2^64 - 1 unmap all. The kernel answers how many bytes it has unmapped. */
export const IoasUnmap = struct("iommu_ioas_unmap", 24, {
  size: le32(0),
  ioasId: le32(4),
  iova: le64(8),
  length: le64(16),
});

/** Of a device's own file (Linux 6.6): /dev/vfio/devices/vfioN. */
export const VFIO_DEVICE_BIND_IOMMUFD = 0x3b76;
export const VFIO_DEVICE_ATTACH_IOMMUFD_PT = 0x3b77;

export const DeviceBind = struct("vfio_device_bind_iommufd", 16, {
  argsz: le32(0),
  flags: le32(4),
  iommufd: le32s(8),
  outDevid: le32(12),
});
/** The kernel answers the ID of the hardware's page table. */
export const DeviceAttach = struct("vfio_device_attach_iommufd_pt", 12, {
  argsz: le32(0),
  flags: le32(4),
  ptId: le32(8),
});
