/** A backend whose unpinner is broken on purpose: it releases what P says is pinned, mapped or not. */
import { workerData } from "node:worker_threads";
import { Backend } from "../../src/control/backend.ts";
import { DmaTrackingTable, type Unit } from "../../src/tracking/dtt.ts";
import { TU_PINNED } from "../../src/wire/dtt.ts";

class BlindTable extends DmaTrackingTable {
  override claimForUnpin(unit: Unit) {
    if (!(this.load(unit) & TU_PINNED)) return "not-pinned";
    this.clearPinned(unit);
    return "claimed";
  }
}

new Backend(workerData, (memory, root, levels) => new BlindTable(memory, root, levels)).run();
