/** Block device: VIRTIO 1.2 section 5.2 (names and values as there). */
import { bytes, le16, le32, le64, struct, u8 } from "./struct.ts";

export const VIRTIO_ID_BLOCK = 2;

export const VIRTIO_BLK_F_SEG_MAX = 2;
export const VIRTIO_BLK_F_BLK_SIZE = 6;
export const VIRTIO_BLK_F_FLUSH = 9;

export const VIRTIO_BLK_T_IN = 0;
export const VIRTIO_BLK_T_OUT = 1;
export const VIRTIO_BLK_T_FLUSH = 4;
export const VIRTIO_BLK_T_GET_ID = 8;

export const VIRTIO_BLK_S_OK = 0;
export const VIRTIO_BLK_S_IOERR = 1;
export const VIRTIO_BLK_S_UNSUPP = 2;

/** Section 5.2.6: sectors are 512 bytes whatever blk_size says. */
export const SECTOR_SIZE = 512;
/** Section 5.2.6: GET_ID returns so many bytes, padded with NUL. */
export const VIRTIO_BLK_ID_BYTES = 20;

/** Section 5.2.4, up to the topology; what follows belongs to features that are not offered. */
export const VirtioBlkConfig = struct("virtio_blk_config", 32, {
  capacity: le64(0),
  sizeMax: le32(8),
  segMax: le32(12),
  cylinders: le16(16),
  heads: u8(18),
  sectors: u8(19),
  blkSize: le32(20),
  topology: bytes(8)(24),
});

/** Section 5.2.6: the head of a request. Data and one status byte follow it. */
export const VirtioBlkReqHead = struct("virtio_blk_req", 16, {
  type: le32(0),
  reserved: le32(4),
  sector: le64(8),
});
