/**
 * NVMe, what a controller is brought up with: NVM Express Base Specification 2.0 ("Base"), NVM Command Set Specification
 * 1.0 ("NVM"), NVMe over PCIe Transport Specification 1.0 ("PCIe"). Names as there.
 */
import { SQE_HEAD } from "./nvme.ts";
import { bytes, le16, le32, le64, struct, u8 } from "./struct.ts";

/** PCI class, subclass and programming interface: PCI Code and ID Assignment, an NVM Express I/O controller. */
export const NVME_CLASS_CODE = 0x010802;

/** In BAR 0. Base, section 3.1.3 "Controller Properties"; each is reached 32 bits at a time. */
export const NvmeProperties = struct("nvme_properties", 56, {
  capLow: le32(0x00),
  capHigh: le32(0x04),
  vs: le32(0x08),
  intms: le32(0x0c),
  intmc: le32(0x10),
  cc: le32(0x14),
  reserved: le32(0x18),
  csts: le32(0x1c),
  nssr: le32(0x20),
  aqa: le32(0x24),
  asq: le64(0x28),
  acq: le64(0x30),
});

/** CAP, Base, section 3.1.3.1. */
export interface NvmeCapabilities {
  /** Entries of an I/O queue at most: MQES + 1. */
  readonly queueSizeMax: number;
  /** How long CSTS.RDY takes to follow CC.EN at most, in ms: TO. */
  readonly readyMs: number;
  /** Bytes from one doorbell to the next: 4 << DSTRD. */
  readonly doorbellStride: number;
  /** It has the NVM command set: CSS bit 0. */
  readonly nvm: boolean;
  /** The smallest memory page, in bytes: MPSMIN. */
  readonly pageMin: number;
}
export const nvmeCapabilities = (low: number, high: number): NvmeCapabilities => ({
  queueSizeMax: (low & 0xffff) + 1,
  readyMs: (low >>> 24) * 500,
  doorbellStride: 4 << (high & 15),
  nvm: (high & 0x20) !== 0,
  pageMin: 2 ** (12 + ((high >>> 16) & 15)),
});

/** CC, Base, section 3.1.3.5: entries of 64 and 16 bytes (IOSQES, IOCQES), pages of 4 KiB, round robin, and EN. */
export const NVME_CC_ENABLE = 1;
export const NVME_CC_CONFIGURATION = (4 << 20) | (6 << 16);
/** SHN 01b: normal shutdown. */
export const NVME_CC_SHUTDOWN = 1 << 14;

/** CSTS, Base, section 3.1.3.6. */
export const NVME_CSTS_READY = 1;
export const NVME_CSTS_FATAL = 2;
export const NVME_CSTS_SHST = 0x0c;
export const NVME_CSTS_SHUT_DOWN = 0x08;

/** AQA, Base, section 3.1.3.8: 0's based, of both queues alike. */
export const packQueueAttributes = (size: number): number => ((size - 1) << 16) | (size - 1);

/** PCIe, section 3.1.2: SQyTDBL; the completion queue's, CQyHDBL, is one stride behind. */
export const nvmeDoorbell = (queue: number, stride: number): number => 0x1000 + 2 * queue * stride;

/** A submission queue entry with its command dwords unnamed: Base, section 3.3.3.1. */
export const NvmeAdminCommand = struct("nvme_admin_sqe", 64, {
  ...SQE_HEAD,
  cdw10: le32(40),
  cdw11: le32(44),
  cdw12: le32(48),
  cdw13: le32(52),
  cdw14: le32(56),
  cdw15: le32(60),
});

/** Base, section 5. */
export const NVME_ADMIN_DELETE_SQ = 0x00;
export const NVME_ADMIN_CREATE_SQ = 0x01;
export const NVME_ADMIN_DELETE_CQ = 0x04;
export const NVME_ADMIN_CREATE_CQ = 0x05;
export const NVME_ADMIN_IDENTIFY = 0x06;
export const NVME_ADMIN_SET_FEATURES = 0x09;

/** CDW10 of both creations: QSIZE, 0's based, and QID. Base, sections 5.4 and 5.5. */
export const packQueue = (id: number, size: number): number => (((size - 1) << 16) | id) >>> 0;
/** CDW11 of Create I/O Completion Queue: contiguous (PC), no interrupts (IEN clear). */
export const NVME_CQ_CONTIGUOUS = 1;
/** CDW11 of Create I/O Submission Queue: CQID, contiguous (PC). */
export const packSubmission = (completionQueue: number): number => ((completionQueue << 16) | 1) >>> 0;

/** CDW10 of Set Features, Base, section 5.27.1.5 "Number of Queues". CDW11 and the answer: NCQ and NSQ, 0's based. */
export const NVME_FEATURE_QUEUES = 0x07;
export const packQueueCount = (pairs: number): number => (((pairs - 1) << 16) | (pairs - 1)) >>> 0;
export const queuePairsOf = (dw0: number): number => Math.min(dw0 & 0xffff, dw0 >>> 16) + 1;

/** CDW10 of Identify: CNS. Base, section 5.17.1. */
export const NVME_IDENTIFY_NAMESPACE = 0x00;
export const NVME_IDENTIFY_CONTROLLER = 0x01;
export const NVME_IDENTIFY_SIZE = 4096;

/** The beginning of what Identify Controller answers: Base, section 5.17.2.1. */
export const NvmeControllerData = struct("nvme_identify_controller", 92, {
  vid: le16(0),
  ssvid: le16(2),
  /** ASCII, padded with blanks, as the next two. */
  serial: bytes(20)(4),
  model: bytes(40)(24),
  firmware: bytes(8)(64),
  rab: u8(72),
  ieee: bytes(3)(73),
  cmic: u8(76),
  /** The longest transfer is pageMin << mdts bytes; 0: there is no limit. */
  mdts: u8(77),
  cntlid: le16(78),
  ver: le32(80),
  rtd3r: le32(84),
  /** How long a shutdown takes, in us; 0: it does not say. */
  rtd3e: le32(88),
});

/** The beginning of what Identify Namespace answers, as far as its LBA formats: NVM, section 4.1.5.1. */
export const NvmeNamespaceData = struct("nvme_identify_namespace", 128, {
  /** In blocks; 0: there is no such namespace. */
  nsze: le64(0),
  ncap: le64(8),
  nuse: le64(16),
  nsfeat: u8(24),
  /** 0's based. */
  nlbaf: u8(25),
  flbas: u8(26),
  mc: u8(27),
  dpc: u8(28),
  dps: u8(29),
  rest: bytes(98)(30),
});
export const NvmeLbaFormat = struct("nvme_lbaf", 4, {
  /** Bytes of metadata with each block. */
  ms: le16(0),
  /** A block has 2^lbads bytes. */
  lbads: u8(2),
  rp: u8(3),
});

/** Where the format in use is. FLBAS bits 6:5 count where there are more than 16 formats. */
export function lbaFormatAt({ flbas, nlbaf }: { readonly flbas: number; readonly nlbaf: number }): number {
  const index = (flbas & 15) | (nlbaf > 15 ? (flbas & 0x60) >> 1 : 0);
  return NvmeNamespaceData.size + index * NvmeLbaFormat.size;
}
