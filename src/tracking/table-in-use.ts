import type { Gfn } from "../base/units.ts";
import type { Claim } from "../policy/policy.ts";
import type { OpenAccesses } from "./accesses.ts";
import { type DmaTrackingTable, NO_UNIT, type Unit } from "./dtt.ts";
import { FAULTED, FAULTED_LATELY, type Ledger, NO_TABLE, SPECULATED } from "./ledger.ts";

/** What is to be done beside the table's own work. */
interface TableHooks {
  /** The guest has used a frame that was pinned unasked. */
  used(gfn: Gfn): void;
  /** What the table says is about to be out of reach. */
  closes(): void;
}

/** The table that a driver has turned PIN on with, if any, and what of the ledger it has claimed since. */
export class TableInUse {
  readonly #ledger: Ledger;
  readonly #accesses: OpenAccesses;
  readonly #hooks: TableHooks;
  #table: DmaTrackingTable | undefined;
  #generation = NO_TABLE;
  #complete = false;
  /** The driver maintains D and W. */
  #marksDirty = false;

  constructor(ledger: Ledger, accesses: OpenAccesses, hooks: TableHooks) {
    this.#ledger = ledger;
    this.#accesses = accesses;
    this.#hooks = hooks;
  }

  get active(): boolean {
    return this.#table !== undefined;
  }
  /** Of the activation: what the ledger has for frames that this table claims. */
  get generation(): number {
    return this.#generation;
  }

  /** `complete`: it has every live mapping of every assigned function (abi.md section 3, pin_flags). `marksDirty`: PIN_DIRTY. */
  open(table: DmaTrackingTable, complete: boolean, marksDirty: boolean): void {
    this.close();
    this.#table = table;
    this.#generation++;
    this.#complete = complete;
    this.#marksDirty = marksDirty;
  }

  close(): void {
    if (this.#table) this.#hooks.closes();
    this.#table = undefined;
  }

  walk(gfn: Gfn): Unit {
    return this.#table?.walk(gfn) ?? NO_UNIT;
  }

  /** A request for `gfn`, which is pinned, is answered. */
  own(gfn: Gfn, unit: Unit): void {
    this.#claimed(gfn);
    this.#table?.setPinned(unit);
  }

  /** The guest relies on a frame from now on, or has been found to. */
  #claimed(gfn: Gfn): void {
    const speculated = this.#ledger.generation(gfn) === SPECULATED;
    this.#ledger.claim(gfn, this.#generation);
    if (speculated) this.#hooks.used(gfn);
  }

  /** Whether a frame has a unit that says nothing of it. */
  isQuiet(gfn: Gfn): boolean {
    const unit = this.walk(gfn);
    return unit !== NO_UNIT && this.#table!.isQuiet(unit);
  }

  /** A frame is pinned, unasked: a map from now on does not ask. */
  show(gfn: Gfn): void {
    const unit = this.walk(gfn);
    if (unit !== NO_UNIT) this.#table!.setPinned(unit);
  }

  /** Whether the guest has used a frame that is pinned unasked; it is this table's then. */
  noticeUse(gfn: Gfn): boolean {
    const unit = this.walk(gfn);
    const used = unit !== NO_UNIT && this.#table!.isUsed(unit);
    if (used) this.#claimed(gfn);
    return used;
  }

  /** May this frame of the ledger be unpinned? "claimed": yes, and its P is clear now. */
  claim(gfn: Gfn): Claim {
    const table = this.#table;
    if (!table || !this.#ledger.has(gfn)) return "gone";
    if (this.#ledger.isNeeded(gfn) || this.#accesses.holds(gfn)) return "mapped";
    const foreign = this.isForeign(gfn);
    const generation = this.#ledger.generation(gfn);
    const faulted = generation === FAULTED || generation === FAULTED_LATELY;
    // abi.md section 3: "PIN on without COMPLETE: ... unpin only frames that this table once claimed." One that was pinned
    // by a fault was not pinned before: who cannot fault did not rely on it, unless it has claimed it since.
    if (foreign && !faulted && !this.#complete) return "mapped";
    const unit = table.walk(gfn);
    const outcome = unit === NO_UNIT ? "not-pinned" : table.claimForUnpin(unit);
    if (generation === SPECULATED && (outcome === "mapped" || outcome === "accessed")) this.#claimed(gfn);
    if (outcome !== "not-pinned") return outcome;
    if (generation === FAULTED_LATELY) {
      this.#ledger.claim(gfn, FAULTED);
      return "accessed";
    }
    // P and COUNT are 0, so nobody relies on this pin: a map from now on asks. One of firmware, or of an earlier table,
    // may go. One that this table claimed has had its P cleared by the guest: abi.md section 4 keeps it.
    return foreign ? "claimed" : "mapped";
  }

  /** Take a claim back: the page is still pinned. */
  unclaim(gfn: Gfn): void {
    const unit = this.walk(gfn);
    if (unit !== NO_UNIT && !this.isForeign(gfn)) this.#table?.setPinned(unit);
  }

  /** The frame goes whatever its unit says: the guest is to ask again. */
  clearPinned(gfn: Gfn): void {
    const unit = this.walk(gfn);
    if (unit !== NO_UNIT) this.#table?.clearPinned(unit);
  }

  /**
   * Whether a device may have written the frame since this was last asked. The driver tells only of frames that this
   * table has claimed; any other may be written at any time, and so may one that a domain maps.
   */
  takeDirty(gfn: Gfn): boolean {
    const known = this.#table && this.#marksDirty && this.#ledger.has(gfn);
    const told = known && !this.isForeign(gfn) && !this.#ledger.isNeeded(gfn);
    const unit = told ? this.walk(gfn) : NO_UNIT;
    return unit === NO_UNIT || this.#table!.takeDirty(unit);
  }

  /**
   * Pinned for firmware, for a domain, for a fault, or by an earlier table, and not asked for since. Not what is pinned
   * unasked with P: its driver tells what devices write, as of all that it maps, and nobody could reach it before.
   */
  isForeign(gfn: Gfn): boolean {
    const generation = this.#ledger.generation(gfn);
    return generation !== this.#generation && generation !== SPECULATED;
  }
}
