import { FRAME_SIZE } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import {
  entryOffset,
  entryTarget,
  gfnCapacity,
  LEAF_BITS,
  TU_ACCESSED,
  TU_COUNT,
  TU_DIRTY,
  TU_PINNED,
  TU_WRITABLE,
  UNIT_SIZE,
  unitOffset,
} from "../wire/dtt.ts";
import type { TableGeometry } from "./table.ts";

/**
 * What get() found. The two failures leave no unit changed, except for A and, in frames that are mapped otherwise too,
 * W.
 */
export type Counted = "pinned" | "ask" | "no-unit" | "saturated";

/** No unit: the table has none for the frame. */
export const NO_UNIT = -1;
const LEAF_FRAMES = 2 ** LEAF_BITS;
/** Leaves that are remembered: of 1 TiB. */
const LEAVES_MAX = 2 ** 18;

/**
 * Tracking units: how mappings count frames up and down. docs/abi.md sections 1 and 2; the same operations in the same
 * order as guest/linux/units.c. No locks: CPUs share nothing but the table.
 */
export class TrackingUnits {
  readonly #memory: GuestMemory;
  readonly #root: number;
  readonly #levels: number;
  readonly #capacity: number;
  readonly #countMax: number;
  /** What a mapping sets that the device may write. */
  readonly #writableMarks: number;
  /** By GFN / 1,024: the leaf's own GFN as #walk found it, or 0. No entry changes while the table is in use. */
  readonly #leaves: Int32Array;

  /**
   * `cpus`: how many may count at once before one sees that COUNT passed the limit. `marksDirty`: with PIN_DIRTY; the
   * host then learns which frames devices have written.
   */
  constructor(memory: GuestMemory, { root, levels }: TableGeometry, cpus: number, marksDirty = false) {
    this.#memory = memory;
    this.#root = root;
    this.#levels = levels;
    this.#capacity = gfnCapacity(levels);
    this.#countMax = TU_COUNT - cpus;
    this.#writableMarks = marksDirty ? TU_ACCESSED | TU_WRITABLE : TU_ACCESSED;
    this.#leaves = new Int32Array(Math.min(this.#capacity / LEAF_FRAMES, LEAVES_MAX));
  }

  /**
   * Count a mapping up in the units of `nr` frames. `write`: the device may write them.
   *
   * ORDERING: COUNT goes up first (fully ordered RMW); P is then tested in the value which that RMW read. PAIRS WITH
   * DmaTrackingTable.claimForUnpin(), one CAS of the whole word: if it comes first, P is clear here and the frame is
   * asked for; if it comes second, it sees COUNT != 0 and fails.
   */
  get(gfn: number, nr: number, write = true): Counted {
    const marks = write ? this.#writableMarks : TU_ACCESSED;
    let asking = false;
    let unit = NO_UNIT;
    for (let i = 0; i < nr; i++) {
      unit = this.#next(unit, gfn + i);
      if (unit === NO_UNIT) {
        this.put(gfn, i, false);
        return "no-unit";
      }
      const before = this.#memory.add32(unit, 1);
      if ((before & TU_COUNT) >= this.#countMax) {
        this.#putUnit(unit, false);
        this.put(gfn, i, false);
        return "saturated";
      }
      // A is only a hint for the host's ageing; COUNT protects the frame. W seen set stays, now that COUNT is not 0.
      if ((before & marks) !== marks) this.#memory.or32(unit, marks);
      if (!(before & TU_PINNED)) asking = true;
    }
    return asking ? "ask" : "pinned";
  }

  /**
   * Count a mapping down in the units of `nr` frames; returns how many had one. Fewer is a bug of the caller's.
   * `written`: the device had the address, and might write.
   */
  put(gfn: number, nr: number, written = true): number {
    let done = 0;
    let unit = NO_UNIT;
    for (let i = 0; i < nr; i++) {
      unit = this.#next(unit, gfn + i);
      if (unit !== NO_UNIT && this.#putUnit(unit, written)) done++;
    }
    return done;
  }

  /**
   * Whether P is set now. The caller has counted `gfn` up, so that it stays set.
   *
   * ORDERING: read after the RMW of get(), and after the answer to a PIN request, because both are fully ordered.
   */
  pinned(gfn: number): boolean {
    const unit = this.find(gfn);
    return unit !== NO_UNIT && (this.#memory.load32(unit) & TU_PINNED) !== 0;
  }

  /**
   * Count one mapping down; false if there is none to count.
   *
   * ORDERING: fully ordered, so the mapping's last access comes before it. The loop, because subtracting from COUNT 0
   * would borrow from the flags. PAIRS WITH claimForUnpin(), which fails until this has made COUNT 0.
   *
   * W is set only with PIN_DIRTY. It becomes D in the same RMW, so that the host's takeDirty() sees one of them at any
   * time; and no COUNT of 0 is left with W, at which claimForUnpin() would fail for ever.
   */
  #putUnit(unit: number, written: boolean): boolean {
    let seen = this.#memory.peek32(unit);
    while (seen & TU_COUNT) {
      const next = seen & TU_WRITABLE ? withoutWriter(seen - 1, written) : seen - 1;
      const found = this.#memory.compareExchange32(unit, seen, next);
      if (found === seen) return true;
      seen = found;
    }
    return false;
  }

  /** The unit of `gfn`, given that of `gfn` - 1 or NO_UNIT. */
  #next(unit: number, gfn: number): number {
    return unit !== NO_UNIT && (gfn & (LEAF_FRAMES - 1)) !== 0 ? unit + UNIT_SIZE : this.find(gfn);
  }

  /**
   * GPA of the unit of `gfn`, or NO_UNIT.
   *
   * ORDERING: an entry is published before the first map, and never changes while the table is in use.
   */
  find(gfn: number): number {
    if (gfn >= this.#capacity) return NO_UNIT;
    const leaf = this.#leaves[(gfn / LEAF_FRAMES) | 0];
    return leaf ? leaf * FRAME_SIZE + unitOffset(gfn) : this.#walk(gfn);
  }

  #walk(gfn: number): number {
    let table: number = this.#root;
    for (let level = this.#levels; level > 1; level--) {
      const at = table + entryOffset(gfn, level);
      const next = entryTarget(this.#memory.load32(at), this.#memory.load32(at + 4));
      if (next === undefined) return NO_UNIT;
      table = next;
    }
    const leaf = table / FRAME_SIZE;
    if (leaf < 2 ** 31) this.#leaves[(gfn / LEAF_FRAMES) | 0] = leaf;
    return table + unitOffset(gfn);
  }
}

/** The word of a frame with W, counted down. */
function withoutWriter(word: number, written: boolean): number {
  const marked = written ? word | TU_DIRTY : word;
  return marked & TU_COUNT ? marked : marked & ~TU_WRITABLE;
}
