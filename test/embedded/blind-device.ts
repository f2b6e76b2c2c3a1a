/** A device behind a gate that is broken on purpose: it lets through what it should, and does not tell. */
import { workerData } from "node:worker_threads";
import type { Gfn } from "../../src/base/units.ts";
import { DeviceThread } from "../../src/machine/embedded/device.ts";
import { NO_FRAME } from "../../src/memory/gated-memory.ts";
import { DeviceGate } from "../../src/tracking/software-iommu.ts";

DeviceGate.prototype.translate = function (page, access) {
  return this.allows(page, access) ? (page as Gfn) : NO_FRAME;
};

new DeviceThread(workerData).run();
