/**
 * The backend of a VM that copies memory as a live migration does, by what each slice of a harvest tells. When it is
 * stopped, after the disk, it compares: frames that hold what the disk put there last must be so in the copy.
 */
import { createHash } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import { workerData } from "node:worker_threads";
import { Backend } from "../../src/control/backend.ts";
import { HostSide } from "../../src/control/host-side.ts";
import { GuestMemory } from "../../src/memory/guest-memory.ts";
import { DirtyTracking } from "../../src/tracking/dirty.ts";
import { DmaTrackingTable, type Unit } from "../../src/tracking/dtt.ts";
import { TU_WRITABLE } from "../../src/wire/dtt.ts";

const FRAME = 4096;
const forgetful = process.env.COIOMMU_TEST_FORGETFUL === "1";
let copy = new GuestMemory();
let memory: GuestMemory | undefined;

class Table extends DmaTrackingTable {
  override takeDirty(unit: Unit): boolean {
    const dirty = super.takeDirty(unit);
    return forgetful ? (this.load(unit) & TU_WRITABLE) !== 0 : dirty;
  }
}

function frameIn(from: GuestMemory, gfn: number): Uint8Array {
  const bytes = new Uint8Array(FRAME);
  from.read(gfn * FRAME, bytes);
  return bytes;
}

const { harvest, start } = DirtyTracking.prototype;
DirtyTracking.prototype.start = function () {
  start.call(this);
  copy = new GuestMemory(memory!.regions.map((r) => ({ ...r, bytes: r.bytes.slice() })));
};
DirtyTracking.prototype.harvest = function (framesMax) {
  const slice = harvest.call(this, framesMax);
  for (let i = 0; i < slice.ranges.length; i += 2)
    for (let gfn = slice.ranges[i]!; gfn < slice.ranges[i]! + slice.ranges[i + 1]!; gfn++)
      copy.write(gfn * FRAME, frameIn(memory!, gfn));
  return slice;
};

const { stop } = HostSide.prototype;
HostSide.prototype.stop = function (disconnect) {
  const written: [number, string][] = JSON.parse(readFileSync(process.env.COIOMMU_TEST_WRITTEN!, "utf8"));
  const hash = (bytes: Uint8Array) => createHash("sha1").update(bytes).digest("hex");
  // The kernel may have put something else there since, or zeros in a frame that had zeros: then nothing can be said.
  const zeros = hash(new Uint8Array(FRAME));
  const unchanged = written
    .filter(([gfn, last]) => last !== zeros && hash(frameIn(memory!, gfn)) === last)
    .map(([gfn]) => gfn);
  const wrong = unchanged.filter((gfn) => Buffer.compare(frameIn(copy, gfn), frameIn(memory!, gfn)) !== 0);
  const begins = (bytes: Uint8Array) => Buffer.from(bytes).toString("hex", 0, 16);
  const example = wrong
    .slice(0, 1)
    .map((gfn) => [gfn, begins(frameIn(copy, gfn)), begins(frameIn(memory!, gfn))]);
  const found = { written: written.length, unchanged: unchanged.length, wrong: wrong.length, example };
  writeFileSync(process.env.COIOMMU_TEST_FOUND!, JSON.stringify(found));
  return stop.call(this, disconnect);
};

new Backend(workerData, (...args) => {
  memory = args[0];
  return new Table(...args);
}).run();
