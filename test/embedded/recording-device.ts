/** A device that writes down, in a file, each frame that it writes: one that no part under test is asked about. */
import { appendFileSync } from "node:fs";
import { workerData } from "node:worker_threads";
import { DeviceThread } from "../../src/machine/embedded/device.ts";
import { GatedMemory } from "../../src/memory/gated-memory.ts";

const file = process.env.COIOMMU_TEST_WRITTEN!;
const seen = new Set<number>();

function note(gpa: number, length: number): void {
  for (let gfn = Math.floor(gpa / 4096); gfn * 4096 < gpa + length; gfn++) {
    if (seen.has(gfn)) continue;
    seen.add(gfn);
    appendFileSync(file, `${gfn}\n`);
  }
}

const { write, store16, transfer } = GatedMemory.prototype;
GatedMemory.prototype.write = function (gpa, from) {
  write.call(this, gpa, from);
  note(gpa, from.length);
};
GatedMemory.prototype.store16 = function (gpa, value) {
  store16.call(this, gpa, value);
  note(gpa, 2);
};
GatedMemory.prototype.transfer = function (gpa, length, each, access) {
  transfer.call(this, gpa, length, each, access);
  if (access === "write") note(gpa, length);
};

new DeviceThread(workerData).run();
