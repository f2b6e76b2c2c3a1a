import type { Gpa } from "../../src/base/units.ts";
import type { GuestMemory } from "../../src/memory/guest-memory.ts";
import { DmaTrackingTable, type Unit } from "../../src/tracking/dtt.ts";
import { TU_PINNED } from "../../src/wire/dtt.ts";

/** For an unpinner that is broken on purpose: it releases what P says is pinned, mapped or not. */
class BlindTable extends DmaTrackingTable {
  override claimForUnpin(unit: Unit) {
    if (!(this.load(unit) & TU_PINNED)) return "not-pinned";
    this.clearPinned(unit);
    return "claimed";
  }
}

export const openBlindTable = (memory: GuestMemory, root: Gpa, levels: number): DmaTrackingTable =>
  new BlindTable(memory, root, levels);
