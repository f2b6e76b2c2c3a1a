/**
 * vhost-user, as QEMU speaks it to a back-end: QEMU docs/interop/vhost-user.rst. Numbers are in the machine's byte
 * order there, which is little-endian here.
 */
import { le32, le64, le64bits, struct } from "./struct.ts";

/** "Front-end message types". */
export const VHOST_USER_GET_FEATURES = 1;
export const VHOST_USER_SET_FEATURES = 2;
export const VHOST_USER_SET_OWNER = 3;
export const VHOST_USER_RESET_OWNER = 4;
export const VHOST_USER_SET_MEM_TABLE = 5;
export const VHOST_USER_SET_VRING_NUM = 8;
export const VHOST_USER_SET_VRING_ADDR = 9;
export const VHOST_USER_SET_VRING_BASE = 10;
export const VHOST_USER_GET_VRING_BASE = 11;
export const VHOST_USER_SET_VRING_KICK = 12;
export const VHOST_USER_SET_VRING_CALL = 13;
export const VHOST_USER_SET_VRING_ERR = 14;
export const VHOST_USER_GET_PROTOCOL_FEATURES = 15;
export const VHOST_USER_SET_PROTOCOL_FEATURES = 16;
export const VHOST_USER_GET_QUEUE_NUM = 17;
export const VHOST_USER_SET_VRING_ENABLE = 18;
export const VHOST_USER_SET_BACKEND_REQ_FD = 21;
export const VHOST_USER_GET_CONFIG = 24;
export const VHOST_USER_SET_CONFIG = 25;

/** VIRTIO 1.2 section 6, beside VIRTIO_F_VERSION_1. */
export const VIRTIO_F_ACCESS_PLATFORM = 33;
/** Bit of the feature mask that announces protocol features; never shown to the guest. */
export const VHOST_USER_F_PROTOCOL_FEATURES = 30;
/** "Protocol features". */
export const VHOST_USER_PROTOCOL_F_MQ = 0;
export const VHOST_USER_PROTOCOL_F_REPLY_ACK = 3;
export const VHOST_USER_PROTOCOL_F_BACKEND_REQ = 5;
export const VHOST_USER_PROTOCOL_F_CONFIG = 9;

/** "Header": bits 0-1 of flags are the version. */
export const VHOST_USER_VERSION_MASK = 0x3;
export const VHOST_USER_VERSION = 0x1;
export const VHOST_USER_REPLY_MASK = 0x4;
export const VHOST_USER_NEED_REPLY_MASK = 0x8;

/** Of the u64 that comes with a kick, call or err fd: ring index, and "there is no fd". */
export const VHOST_USER_VRING_IDX_MASK = 0xff;
export const VHOST_USER_VRING_NOFD_MASK = 0x100;

/** VHOST_MEMORY_BASELINE_NREGIONS: "region0 ... region7". */
export const VHOST_USER_REGIONS_MAX = 8;
/** VHOST_USER_MAX_CONFIG_SIZE of QEMU. */
export const VHOST_USER_CONFIG_MAX = 256;

export const VhostUserHeader = struct("vhost_user_header", 12, {
  request: le32(0),
  flags: le32(4),
  size: le32(8),
});
export const VhostUserU64 = struct("vhost_user_u64", 8, { value: le64bits(0) });
export const VringState = struct("vhost_vring_state", 8, { index: le32(0), num: le32(4) });
/** Addresses are the front-end's own (QEMU's), to be found in the memory table. */
export const VringAddr = struct("vhost_vring_addr", 40, {
  index: le32(0),
  flags: le32(4),
  descriptor: le64(8),
  used: le64(16),
  available: le64(24),
  log: le64(32),
});
/** Followed by `count` regions; one fd each. */
export const MemoryTableHead = struct("vhost_user_memory", 8, { count: le32(0), padding: le32(4) });
export const MemoryTableRegion = struct("vhost_user_memory_region", 32, {
  gpa: le64(0),
  size: le64(8),
  userAddress: le64(16),
  mmapOffset: le64(24),
});
/** Followed by `size` bytes of configuration space. */
export const ConfigHead = struct("vhost_user_config", 12, {
  offset: le32(0),
  size: le32(4),
  flags: le32(8),
});

/** Region `index` of a SET_MEM_TABLE payload, whose length the caller has checked. */
export const memoryTableRegion = (payload: Uint8Array, index: number) =>
  MemoryTableRegion.read(payload, MemoryTableHead.size + index * MemoryTableRegion.size);
export const memoryTableSize = (count: number): number =>
  MemoryTableHead.size + count * MemoryTableRegion.size;
