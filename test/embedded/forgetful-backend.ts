/** A backend whose harvest is broken on purpose: it clears D, and does not tell. */
import { workerData } from "node:worker_threads";
import { EmbeddedBackend } from "../../src/control/embedded-backend.ts";
import { DmaTrackingTable, type Unit } from "../../src/tracking/dtt.ts";
import { TU_WRITABLE } from "../../src/wire/dtt.ts";

class Forgetful extends DmaTrackingTable {
  override takeDirty(unit: Unit): boolean {
    super.takeDirty(unit);
    return (this.load(unit) & TU_WRITABLE) !== 0;
  }
}

new EmbeddedBackend(workerData, (...args) => new Forgetful(...args)).run();
