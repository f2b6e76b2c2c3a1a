/** Disks of a VM; the second one dies inside a DMA window when it has served some requests. */
import { workerData } from "node:worker_threads";
import { DiskThread } from "../../src/control/disk.ts";
import { DeviceGate } from "../../src/tracking/software-iommu.ts";

const { leave } = DeviceGate.prototype;
let windows = 3000;
if (workerData.gate === 1)
  DeviceGate.prototype.leave = function () {
    if (windows-- === 0) process.exit(1);
    leave.call(this);
  };
new DiskThread(workerData).run();
