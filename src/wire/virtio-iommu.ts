/**
 * virtio-iommu: VIRTIO 1.2 section 5.13 "IOMMU Device" (names and values as there), and the PIN_PAGE extension of
 * docs/abi.md section 3. All numbers of the extension are in this file, because none is assigned by the standard.
 */
import { bytes, le16, le32, le64, le64bits, struct, u8 } from "./struct.ts";

export const VIRTIO_ID_IOMMU = 23;

export const VIRTIO_IOMMU_F_INPUT_RANGE = 0;
export const VIRTIO_IOMMU_F_DOMAIN_RANGE = 1;
export const VIRTIO_IOMMU_F_MAP_UNMAP = 2;
export const VIRTIO_IOMMU_F_BYPASS = 3;
export const VIRTIO_IOMMU_F_PROBE = 4;
export const VIRTIO_IOMMU_F_MMIO = 5;
export const VIRTIO_IOMMU_F_BYPASS_CONFIG = 6;
/** abi.md section 3. */
export const VIRTIO_IOMMU_F_PIN_PAGE = 16;
export const VIRTIO_IOMMU_F_PIN_DIRTY = 17;

export const VIRTIO_IOMMU_T_ATTACH = 0x01;
export const VIRTIO_IOMMU_T_DETACH = 0x02;
export const VIRTIO_IOMMU_T_MAP = 0x03;
export const VIRTIO_IOMMU_T_UNMAP = 0x04;
export const VIRTIO_IOMMU_T_PROBE = 0x05;
/** abi.md section 3. */
export const VIRTIO_IOMMU_T_PIN = 0x40;

export const VIRTIO_IOMMU_ATTACH_F_BYPASS = 0x01;
export const VIRTIO_IOMMU_MAP_F_READ = 0x01;
export const VIRTIO_IOMMU_MAP_F_WRITE = 0x02;
export const VIRTIO_IOMMU_MAP_F_MMIO = 0x04;

export const VIRTIO_IOMMU_S_OK = 0;
export const VIRTIO_IOMMU_S_IOERR = 1;
export const VIRTIO_IOMMU_S_UNSUPP = 2;
export const VIRTIO_IOMMU_S_DEVERR = 3;
export const VIRTIO_IOMMU_S_INVAL = 4;
export const VIRTIO_IOMMU_S_RANGE = 5;
export const VIRTIO_IOMMU_S_NOENT = 6;
export const VIRTIO_IOMMU_S_FAULT = 7;
export const VIRTIO_IOMMU_S_NOMEM = 8;

/** abi.md section 3, "Configuration": values of pin_control, pin_status and pin_flags. */
export const PIN_CONTROL_OFF = 0;
export const PIN_CONTROL_ON = 1;
export const PIN_CONTROL_PARK = 2;
export const PIN_CONTROL_UNPARK = 3;
export const PIN_STATUS_OFF = 0;
export const PIN_STATUS_ON = 1;
export const PIN_STATUS_PARKED = 2;
/** Added to the status of a control write that was refused. */
export const PIN_STATUS_REFUSED = 0x80;
export const PIN_FLAG_COMPLETE = 0x01;
/** The assigned bitmap: one bit for each of 65,536 BDFs. */
export const ASSIGNED_BITMAP_SIZE = 8192;

/** struct virtio_iommu_config, followed at 64 by the extension. */
export const Config = struct("virtio_iommu_config", 96, {
  pageSizeMask: le64bits(0),
  inputStart: le64bits(8),
  inputEnd: le64bits(16),
  domainStart: le32(24),
  domainEnd: le32(28),
  probeSize: le32(32),
  bypass: u8(36),
  reserved: bytes(3)(37),
  unused: bytes(24)(40),
  assignedBitmap: le64(64),
  dttRoot: le64(72),
  dttLevels: u8(80),
  pinControl: u8(81),
  pinStatus: u8(82),
  pinFlags: u8(83),
  pinBatchMax: le32(84),
  pinQuota: le64bits(88),
});

export const ReqHead = struct("virtio_iommu_req_head", 4, { type: u8(0), reserved: bytes(3)(1) });
export const ReqTail = struct("virtio_iommu_req_tail", 4, { status: u8(0), reserved: bytes(3)(1) });

/** The requests below are without their tail, which lies in the device-writable part. */
export const ReqAttach = struct("virtio_iommu_req_attach", 20, {
  type: u8(0),
  headReserved: bytes(3)(1),
  domain: le32(4),
  endpoint: le32(8),
  flags: le32(12),
  reserved: bytes(4)(16),
});
export const ReqDetach = struct("virtio_iommu_req_detach", 20, {
  type: u8(0),
  headReserved: bytes(3)(1),
  domain: le32(4),
  endpoint: le32(8),
  reserved: bytes(8)(12),
});
export const ReqMap = struct("virtio_iommu_req_map", 36, {
  type: u8(0),
  headReserved: bytes(3)(1),
  domain: le32(4),
  virtStart: le64bits(8),
  virtEnd: le64bits(16),
  physStart: le64(24),
  flags: le32(32),
});
export const ReqUnmap = struct("virtio_iommu_req_unmap", 28, {
  type: u8(0),
  headReserved: bytes(3)(1),
  domain: le32(4),
  virtStart: le64bits(8),
  virtEnd: le64bits(16),
  reserved: bytes(4)(24),
});
export const ReqProbe = struct("virtio_iommu_req_probe", 72, {
  type: u8(0),
  headReserved: bytes(3)(1),
  endpoint: le32(4),
  reserved: bytes(64)(8),
});
/** abi.md section 3, "PIN request"; nrRanges PinRanges follow. */
export const ReqPin = struct("virtio_iommu_req_pin", 16, {
  type: u8(0),
  headReserved: bytes(3)(1),
  endpoint: le32(4),
  flags: le32(8),
  nrRanges: le32(12),
});
export const PinRange = struct("virtio_iommu_pin_range", 16, {
  gfn: le64(0),
  nrFrames: le32(8),
  reserved: le32(12),
});

/** VIRTIO 1.2 "PROBE properties": RESV_MEM. */
export const VIRTIO_IOMMU_PROBE_T_RESV_MEM = 1;
export const VIRTIO_IOMMU_RESV_MEM_T_RESERVED = 0;
export const VIRTIO_IOMMU_RESV_MEM_T_MSI = 1;
export const ProbeResvMem = struct("virtio_iommu_probe_resv_mem", 24, {
  type: le16(0),
  length: le16(2),
  subtype: u8(4),
  reserved: bytes(3)(5),
  start: le64(8),
  end: le64(16),
});

export const VIRTIO_IOMMU_FAULT_R_UNKNOWN = 0;
export const VIRTIO_IOMMU_FAULT_R_DOMAIN = 1;
export const VIRTIO_IOMMU_FAULT_R_MAPPING = 2;
export const VIRTIO_IOMMU_FAULT_F_READ = 0x001;
export const VIRTIO_IOMMU_FAULT_F_WRITE = 0x002;
export const VIRTIO_IOMMU_FAULT_F_ADDRESS = 0x100;
export const Fault = struct("virtio_iommu_fault", 24, {
  reason: u8(0),
  reserved: bytes(3)(1),
  flags: le32(4),
  endpoint: le32(8),
  reserved2: le32(12),
  address: le64(16),
});
