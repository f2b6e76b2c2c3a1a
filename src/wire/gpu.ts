/**
 * The copy engine of our graphics device. No standard has it; the ring of commands with a status in each, and the
 * one-level table that makes scattered frames contiguous for the device (GART), are what real ones have.
 */
import { bytes, le16, le32, le64, struct } from "./struct.ts";

export const GpuCommand = struct("gpu_command", 32, {
  opcode: le16(0),
  /** Written by the device, last: GPU_DONE, and the error in the high byte. */
  status: le16(2),
  length: le32(4),
  /** Device addresses: page of the table * 4096 + offset. */
  source: le64(8),
  target: le64(16),
  reserved: bytes(8)(24),
});

export const GPU_COPY = 1;
/** Bytes of one command. */
export const GPU_LENGTH_MAX = 65_536;

export const GPU_DONE = 1;
export const GPU_OK = 0;
/** The opcode, the length, or an address behind the table. */
export const GPU_INVALID = 1;
/** A page without a valid entry. */
export const GPU_NO_PAGE = 2;
/** The IOMMU forbids a frame, or there is no memory. */
export const GPU_BUS_ERROR = 3;
export const gpuError = (status: number): number => status >> 8;

/** An entry of the table: a frame's address, and bit 0. */
export const GpuPage = struct("gpu_page", 8, { entry: le64(0) });
export const GPU_PAGE_VALID = 1;
