/**
 * NVMe: NVM Express Base Specification 2.0 ("Base"), NVM Command Set Specification 1.0 ("NVM"), NVMe over PCIe
 * Transport Specification 1.0 ("PCIe"). Names of status codes as there.
 */
import { le16, le32, le64, struct, u8 } from "./struct.ts";

/** What every submission queue entry begins with: Base, section 3.3.3.1 "Submission Queue Entry". */
export const SQE_HEAD = {
  opcode: u8(0),
  /** Bits 1:0 FUSE, bits 7:6 PSDT. */
  flags: u8(1),
  cid: le16(2),
  nsid: le32(4),
  cdw2: le32(8),
  cdw3: le32(12),
  mptr: le64(16),
  prp1: le64(24),
  prp2: le64(32),
} as const;

/** As in Read and Write from slba on, NVM section 3.2. */
export const NvmeCommand = struct("nvme_sqe", 64, {
  ...SQE_HEAD,
  slba: le64(40),
  /** 0's based. */
  nlb: le16(48),
  /** CDW12 bits 31:16. */
  control: le16(50),
  cdw13: le32(52),
  cdw14: le32(56),
  cdw15: le32(60),
});

/** Base, section 3.3.3.2 "Common Completion Queue Entry". */
export const NvmeCompletion = struct("nvme_cqe", 16, {
  dw0: le32(0),
  dw1: le32(4),
  sqHead: le16(8),
  sqId: le16(10),
  cid: le16(12),
  /** Bit 0 is the phase tag, which is written last; the rest is packStatus(). */
  status: le16(14),
});

export const NVME_CMD_FLUSH = 0x00;
export const NVME_CMD_WRITE = 0x01;
export const NVME_CMD_READ = 0x02;

export const NVME_FLAGS_FUSE = 0x03;
export const NVME_FLAGS_PSDT = 0xc0;
/** Force Unit Access: CDW12 bit 30. NVM, section 3.2.6. */
export const NVME_CONTROL_FUA = 1 << 14;
export const NVME_NSID_ALL = 0xffff_ffff;

/** Status Code Type (bits 10:8) and Status Code (bits 7:0). Base, section 3.3.3.2.1 "Status Field Definition". */
export const NVME_SUCCESS = 0x000;
export const NVME_INVALID_OPCODE = 0x001;
export const NVME_INVALID_FIELD = 0x002;
export const NVME_DATA_TRANSFER_ERROR = 0x004;
export const NVME_INTERNAL_ERROR = 0x006;
export const NVME_INVALID_NAMESPACE = 0x00b;
export const NVME_PRP_OFFSET_INVALID = 0x013;
export const NVME_LBA_OUT_OF_RANGE = 0x080;
export const NVME_WRITE_FAULT = 0x280;
export const NVME_UNRECOVERED_READ_ERROR = 0x281;

const PHASE = 1;
const DO_NOT_RETRY = 1 << 15;

/** The status half-word of a completion. `again`: the same command may succeed later (DNR clear). */
export const packStatus = (status: number, again: boolean, phase: number): number =>
  (status << 1) | (status !== NVME_SUCCESS && !again ? DO_NOT_RETRY : 0) | phase;
export const statusOf = (field: number): number => (field >> 1) & 0x7ff;
export const phaseOf = (field: number): number => field & PHASE;

/** CC.MPS = 0 (Base, section 3.1.3.5): what PRP entries point to. */
export const NVME_PAGE_SIZE = 4096;
/** Base, section 4.1.1 "Physical Region Page Entry and List". */
export const PrpEntry = struct("nvme_prp", 8, { address: le64(0) });
export const PRP_LIST_ENTRIES = NVME_PAGE_SIZE / PrpEntry.size;

/** PRP entries of a transfer whose first byte is at `offset` in its page. */
export const prpEntries = (offset: number, length: number): number =>
  Math.ceil((offset + length) / NVME_PAGE_SIZE);
