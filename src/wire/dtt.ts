/** DMA Tracking Table: geometry and bits. docs/abi.md section 1. */

/** Upper levels: 512 entries of 8 bytes. */
export const ENTRY_SIZE = 8;
export const ENTRY_BITS = 9;
export const ENTRY_PRESENT = 0x1;
/** Leaf: 1,024 units of 4 bytes; one leaf covers 4 MiB. */
export const UNIT_SIZE = 4;
export const LEAF_BITS = 10;
export const LEVELS_MAX = 5;
export const TABLE_SIZE = 4096;

/** Number of live DMA mappings of the frame; written by the guest. M is COUNT != 0. */
export const TU_COUNT = 0x0000_ffff;
export const TU_RESERVED = 0x0fff_0000;
/** A device may have written the frame since the host last cleared D. */
export const TU_DIRTY = 0x1000_0000;
/** At least one live mapping lets the device write; only with PIN_DIRTY. */
export const TU_WRITABLE = 0x2000_0000;
/** Mapped since the host last cleared A. */
export const TU_ACCESSED = 0x4000_0000;
/** Set by the host: DMA to the frame is safe. */
export const TU_PINNED = 0x8000_0000;

/**
 * An upper-level entry, read as two 32-bit halves: the GPA of the next table, or undefined when it is absent or
 * malformed. Bits 1..11 and 52..63 are reserved and must be zero.
 */
export function entryTarget(low: number, high: number): number | undefined {
  if ((low & 0xfff) !== ENTRY_PRESENT || high >>> 20 !== 0) return undefined;
  const target = (low & 0xffff_f000) >>> 0;
  // Keeps addresses below 2 GiB in V8's small integers.
  return high === 0 ? target : (high >>> 0) * 2 ** 32 + target;
}

/** Levels that a table needs for GFNs up to `last`. abi.md section 1: 1 + ceil((gfn_bits - 10) / 9). */
export function levelsFor(last: number): number {
  let levels = 1;
  while (last >= gfnCapacity(levels)) levels++;
  return levels;
}

const ENTRY_MASK = 2 ** ENTRY_BITS - 1;
const LEAF_MASK = 2 ** LEAF_BITS - 1;
/** By level: 1 / GFNs below an entry. */
const ENTRIES_PER_GFN = Array.from(
  { length: LEVELS_MAX + 1 },
  (_, level) => 2 ** -(LEAF_BITS + ENTRY_BITS * (level - 2)),
);

// `&` looks at the low 32 bits of an integer of any size, and drops a fraction; `%` of what exceeds 31 bits is slow.

/** Byte offset, in the table of `level` (>= 2), of the entry on the way to `gfn`. */
export const entryOffset = (gfn: number, level: number): number =>
  ((gfn * ENTRIES_PER_GFN[level]!) & ENTRY_MASK) * ENTRY_SIZE;

/** Byte offset of the unit of `gfn` in its leaf. */
export const unitOffset = (gfn: number): number => (gfn & LEAF_MASK) * UNIT_SIZE;

/** GFNs that a table of `levels` levels can hold. */
export const gfnCapacity = (levels: number): number => 2 ** (LEAF_BITS + ENTRY_BITS * (levels - 1));
