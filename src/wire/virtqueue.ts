/** Split virtqueue. VIRTIO 1.2 section 2.7 "Split Virtqueues". */
import { le16, le32, le64, struct } from "./struct.ts";

export const VIRTQ_DESC_F_NEXT = 1;
export const VIRTQ_DESC_F_WRITE = 2;
export const VIRTQ_DESC_F_INDIRECT = 4;
export const VIRTQ_AVAIL_F_NO_INTERRUPT = 1;

export const Desc = struct("virtq_desc", 16, {
  addr: le64(0),
  len: le32(8),
  flags: le16(12),
  next: le16(14),
});
export const UsedElem = struct("virtq_used_elem", 8, { id: le32(0), len: le32(4) });
/** The fixed part of the available and of the used ring; the elements follow. */
export const RingHead = struct("virtq_ring_head", 4, { flags: le16(0), idx: le16(2) });

export const descOffset = (index: number): number => index * Desc.size;
export const availOffset = (slot: number): number => RingHead.size + 2 * slot;
export const usedOffset = (slot: number): number => RingHead.size + UsedElem.size * slot;

/** Bytes of each part for `size` descriptors, without the event fields (VIRTIO_F_EVENT_IDX is not offered). */
export const descTableSize = (size: number): number => descOffset(size);
export const availRingSize = (size: number): number => availOffset(size);
export const usedRingSize = (size: number): number => usedOffset(size);

export const QUEUE_SIZE_MAX = 32768;
