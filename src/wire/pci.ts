/** PCI configuration space of a type 0 function (PCI Local Bus 3.0, section 6.1), and virtio's part of it. */
import { bytes, le16, le32, le64bits, struct, u8 } from "./struct.ts";

export const PCI_CONFIG_SIZE = 256;
export const PCI_COMMAND_MEMORY = 0x2;
export const PCI_COMMAND_MASTER = 0x4;
export const PCI_COMMAND_INTX_DISABLE = 0x400;
export const PCI_STATUS_CAP_LIST = 0x10;
/** Bits of the command register that we implement: I/O, memory, bus master, INTx disable. */
export const PCI_COMMAND_WRITABLE = 0x0407;
export const PCI_CAP_ID_VNDR = 0x09;

export const PciHeader = struct("pci_header", 64, {
  vendorId: le16(0),
  deviceId: le16(2),
  command: le16(4),
  status: le16(6),
  revision: u8(8),
  progIf: u8(9),
  subclass: u8(10),
  baseClass: u8(11),
  cacheLine: u8(12),
  latency: u8(13),
  headerType: u8(14),
  bist: u8(15),
  bar0: le32(16),
  bars: bytes(20)(20),
  cardbus: le32(40),
  subsystemVendorId: le16(44),
  subsystemId: le16(46),
  rom: le32(48),
  capabilities: u8(52),
  reserved: bytes(7)(53),
  interruptLine: u8(60),
  interruptPin: u8(61),
  minGrant: u8(62),
  maxLatency: u8(63),
});

/** Byte offset of base address register `index`, 0 to 5. */
export const barRegister = (index: number): number => PciHeader.fields.bar0.at + 4 * index;

/** VIRTIO 1.2 section 4.1.2.1. */
export const VIRTIO_PCI_VENDOR_ID = 0x1af4;
export const VIRTIO_PCI_DEVICE_ID_BASE = 0x1040;
/** VIRTIO 1.2 section 4.1.4: cfg_type of a vendor capability. */
export const VIRTIO_PCI_CAP_COMMON_CFG = 1;
export const VIRTIO_PCI_CAP_NOTIFY_CFG = 2;
export const VIRTIO_PCI_CAP_ISR_CFG = 3;
export const VIRTIO_PCI_CAP_DEVICE_CFG = 4;

export const VirtioPciCap = struct("virtio_pci_cap", 16, {
  vndr: u8(0),
  next: u8(1),
  length: u8(2),
  cfgType: u8(3),
  bar: u8(4),
  id: u8(5),
  padding: le16(6),
  offset: le32(8),
  size: le32(12),
});
export const VirtioPciNotifyCap = struct("virtio_pci_notify_cap", 20, {
  ...VirtioPciCap.fields,
  multiplier: le32(16),
});

/** VIRTIO 1.2 section 4.1.4.3. */
export const VirtioPciCommonCfg = struct("virtio_pci_common_cfg", 56, {
  deviceFeatureSelect: le32(0),
  deviceFeature: le32(4),
  driverFeatureSelect: le32(8),
  driverFeature: le32(12),
  configMsixVector: le16(16),
  numQueues: le16(18),
  deviceStatus: u8(20),
  configGeneration: u8(21),
  queueSelect: le16(22),
  queueSize: le16(24),
  queueMsixVector: le16(26),
  queueEnable: le16(28),
  queueNotifyOff: le16(30),
  queueDesc: le64bits(32),
  queueDriver: le64bits(40),
  queueDevice: le64bits(48),
});
export const VIRTIO_MSI_NO_VECTOR = 0xffff;

/** VIRTIO 1.2 section 2.1. */
export const VIRTIO_STATUS_ACKNOWLEDGE = 1;
export const VIRTIO_STATUS_DRIVER = 2;
export const VIRTIO_STATUS_DRIVER_OK = 4;
export const VIRTIO_STATUS_FEATURES_OK = 8;
export const VIRTIO_STATUS_NEEDS_RESET = 64;
/** VIRTIO 1.2 section 6. */
export const VIRTIO_F_VERSION_1 = 32;
