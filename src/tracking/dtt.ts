import type { Gfn, Gpa } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import {
  entryOffset,
  entryTarget,
  gfnCapacity,
  LEVELS_MAX,
  TABLE_SIZE,
  TU_ACCESSED,
  TU_COUNT,
  TU_DIRTY,
  TU_PINNED,
  TU_WRITABLE,
  unitOffset,
} from "../wire/dtt.ts";

/** GPA of a tracking unit: in guest RAM and aligned, as walk() found it. */
export type Unit = Gpa & { readonly of: "tracking unit" };
/** "No unit": the walk met an entry that is absent, malformed, or outside RAM. */
export const NO_UNIT = -1 as Unit;

/**
 * The host's view of a guest's DMA Tracking Table. docs/abi.md sections 1 and 2. Every entry and unit is hostile:
 * the walk yields NO_UNIT where the table is wrong, and a unit is a hint, never the truth about what is pinned.
 */
export class DmaTrackingTable {
  readonly root: Gpa;
  readonly levels: number;
  readonly #memory: GuestMemory;

  constructor(memory: GuestMemory, root: Gpa, levels: number) {
    this.#memory = memory;
    this.root = root;
    this.levels = levels;
  }

  /** Whether a driver may activate a table with this root and number of levels. */
  static valid(memory: GuestMemory, root: number, levels: number): boolean {
    return (
      Number.isInteger(levels) &&
      levels >= 1 &&
      levels <= LEVELS_MAX &&
      root % TABLE_SIZE === 0 &&
      memory.find(root, TABLE_SIZE) !== undefined
    );
  }

  /** The unit of `gfn`, or NO_UNIT. */
  walk(gfn: Gfn): Unit {
    if (gfn >= gfnCapacity(this.levels)) return NO_UNIT;
    let table: number = this.root;
    for (let level = this.levels; level > 1; level--) {
      const at = table + entryOffset(gfn, level);
      // The table may have been taken out of the memory map since activation.
      if (!this.#memory.find(at, 8)) return NO_UNIT;
      // ORDERING: acquire. The driver publishes an entry with one 64-bit release store, so when the low half shows
      // PRESENT, the high half and the zeroed page are seen too. PAIRS WITH make_table() in guest/linux/table.c.
      const low = this.#memory.load32(at);
      const target = entryTarget(low, this.#memory.load32(at + 4));
      if (target === undefined) return NO_UNIT;
      table = target;
    }
    return this.#memory.find(table, TABLE_SIZE) ? ((table + unitOffset(gfn)) as Unit) : NO_UNIT;
  }

  /** The unit's word, unsigned. */
  load(unit: Unit): number {
    return this.#memory.load32(unit) >>> 0;
  }

  /** Neither mapped, nor lately, nor pinned; D may be left of an earlier time. */
  isQuiet(unit: Unit): boolean {
    return (this.load(unit) & ~TU_DIRTY) === 0;
  }

  /** Mapped now, or since the host last cleared A. */
  isUsed(unit: Unit): boolean {
    return (this.load(unit) & (TU_COUNT | TU_ACCESSED)) !== 0;
  }

  /** P = 1. The page must have been pinned before (abi.md section 2, "Host pin"). */
  setPinned(unit: Unit): void {
    this.#memory.or32(unit, TU_PINNED | 0);
  }

  /** P = 0 whatever the unit says: for a frame that is no longer RAM. */
  clearPinned(unit: Unit): void {
    this.#memory.and32(unit, ~TU_PINNED);
  }

  /**
   * Clear P iff the frame is neither mapped nor recently used: one CAS of the whole word from exactly P (with or
   * without D, which is carried) to P cleared.
   *
   * ORDERING: P, A and COUNT share the word, so a guest map is either before the CAS (COUNT != 0: it fails) or after
   * it (its value lacks P: the guest asks, and the backend serves that after the release). PAIRS WITH
   * coiommu_dtt_get() in guest/linux/units.c.
   * TRUST: the guest can forge P; the caller must also find the frame in the ledger.
   */
  claimForUnpin(unit: Unit): "claimed" | "mapped" | "accessed" | "not-pinned" {
    const seen = this.#memory.load32(unit);
    const value = seen >>> 0;
    if (!(value & TU_PINNED)) return value & TU_COUNT ? "mapped" : "not-pinned";
    if (value === TU_PINNED || value === (TU_PINNED | TU_DIRTY) >>> 0)
      return this.#memory.compareExchange32(unit, seen, seen & ~TU_PINNED) === seen ? "claimed" : "mapped";
    if (value & TU_ACCESSED) this.#memory.and32(unit, ~TU_ACCESSED);
    return value & TU_COUNT ? "mapped" : "accessed";
  }
  /**
   * Whether a device may have written the frame since this was last asked: D, which is cleared, or W.
   *
   * ORDERING: the driver sets W before the device gets the address, and turns it into D when the device is done, in
   * one RMW. So a write is before the load here and W or D is seen, or one of them is there for the next harvest. D is
   * cleared by an RMW, because the guest counts in the same word, and before the page is copied.
   * PAIRS WITH put_unit() in guest/linux/units.c.
   */
  takeDirty(unit: Unit): boolean {
    const seen = this.#memory.load32(unit);
    if (seen & TU_DIRTY) this.#memory.and32(unit, ~TU_DIRTY);
    return (seen & (TU_DIRTY | TU_WRITABLE)) !== 0;
  }
}
