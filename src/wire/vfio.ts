/**
 * VFIO's container, group and device: Linux, include/uapi/linux/vfio.h. The numbers are _IO(';', 100 + n); what they
 * take says its size in `argsz`, and the kernel reads and fills no more than that.
 */
import { le32, le32s, le64, struct } from "./struct.ts";

const TYPE = 0x3b;
const BASE = 100;
const io = (n: number): number => (TYPE << 8) | (BASE + n);

export const VFIO_API_VERSION = 0;
/** Type 1 with unmappings that fit what was mapped: what the second version is about. */
export const VFIO_TYPE1v2_IOMMU = 3;

/** Of the container. The first takes nothing, the others an IOMMU model. */
export const VFIO_GET_API_VERSION = io(0);
export const VFIO_CHECK_EXTENSION = io(1);
export const VFIO_SET_IOMMU = io(2);
/** Of a group: VfioGroupStatus; VfioFd, a container; none; the name of a function, as "0000:00:06.0". */
export const VFIO_GROUP_GET_STATUS = io(3);
export const VFIO_GROUP_SET_CONTAINER = io(4);
export const VFIO_GROUP_GET_DEVICE_FD = io(6);
/** Of a device: VfioDeviceInfo; VfioRegionInfo; nothing. */
export const VFIO_DEVICE_GET_INFO = io(7);
export const VFIO_DEVICE_GET_REGION_INFO = io(8);
export const VFIO_DEVICE_RESET = io(11);

export const VfioGroupStatus = struct("vfio_group_status", 8, { argsz: le32(0), flags: le32(4) });
/** Every function of the group is bound to VFIO or to nothing. */
export const VFIO_GROUP_FLAGS_VIABLE = 1;

/** An `int` that is passed by its address. */
export const VfioFd = struct("vfio_fd", 4, { fd: le32s(0) });

/** Without cap_offset, which is there since Linux 5.5: `argsz` says that it is not wanted. */
export const VfioDeviceInfo = struct("vfio_device_info", 16, {
  argsz: le32(0),
  flags: le32(4),
  regions: le32(8),
  irqs: le32(12),
});
/** The kernel can reset it. */
export const VFIO_DEVICE_FLAGS_RESET = 1;
export const VFIO_DEVICE_FLAGS_PCI = 2;

export const VfioRegionInfo = struct("vfio_region_info", 32, {
  argsz: le32(0),
  flags: le32(4),
  index: le32(8),
  capOffset: le32(12),
  size: le64(16),
  /** In the device's file, for pread(2), pwrite(2) and mmap(2). */
  offset: le64(24),
});
export const VFIO_REGION_INFO_FLAG_MMAP = 4;
/** BARs are the regions 0 to 5. */
export const VFIO_PCI_CONFIG_REGION_INDEX = 7;
