/** QEMU's multi-process protocol: docs/devel/multi-process.rst, include/hw/remote/mpqemu-link.h (QEMU 7.2). */
import { bytes, le32, le32s, le64, le64bits, struct, u8 } from "./struct.ts";

export const MPQEMU_CMD_SYNC_SYSMEM = 0;
export const MPQEMU_CMD_RET = 1;
export const MPQEMU_CMD_PCI_CFGWRITE = 2;
export const MPQEMU_CMD_PCI_CFGREAD = 3;
export const MPQEMU_CMD_BAR_WRITE = 4;
export const MPQEMU_CMD_BAR_READ = 5;
export const MPQEMU_CMD_SET_IRQFD = 6;
export const MPQEMU_CMD_DEVICE_RESET = 7;

export const REMOTE_MAX_FDS = 8;
/** RET carries this for a failed request. */
export const MPQEMU_RET_ERROR = 0xffff_ffff_ffff_ffffn;

/** `size` bytes of payload follow; file descriptors come with the header. */
export const MPQemuHeader = struct("mpqemu_header", 16, {
  command: le32s(0),
  padding: le32(4),
  size: le64(8),
});
export const MPQemuRet = struct("mpqemu_ret", 8, { value: le64bits(0) });
export const MPQemuPciConfig = struct("PciConfDataMsg", 12, {
  address: le32(0),
  value: le32(4),
  length: le32s(8),
});
/** `address` is absolute: BAR base plus offset. */
export const MPQemuBarAccess = struct("BarAccessMsg", 24, {
  address: le64(0),
  value: le64bits(8),
  size: le32(16),
  memory: u8(20),
  padding: bytes(3)(21),
});
export const MPQemuRegion = struct("SyncSysmemMsg entry", 24, {
  gpa: le64(0),
  size: le64(8),
  offset: le64(16),
});

/** SyncSysmemMsg is three arrays of 8; entry `index` of it. */
export function sysmemEntry(
  payload: Uint8Array,
  index: number,
): { gpa: number; size: number; offset: number } {
  const view = new DataView(payload.buffer, payload.byteOffset, payload.byteLength);
  const at = (array: number) => MPQemuRegion.fields.gpa.read(view, 8 * (array * REMOTE_MAX_FDS + index));
  return { gpa: at(0), size: at(1), offset: at(2) };
}
export const SYSMEM_SIZE = 3 * 8 * REMOTE_MAX_FDS;
