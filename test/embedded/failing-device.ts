/** A device that has a bug: it throws when its driver rings for the hundredth time. */
import { workerData } from "node:worker_threads";
import { DeviceThread } from "../../src/machine/embedded/device.ts";
import { DeviceRegisters } from "../../src/machine/embedded/doorbells.ts";

let left = 100;
const { changed } = DeviceRegisters.prototype;
DeviceRegisters.prototype.changed = function (each) {
  changed.call(this, (register, value) => {
    if (left-- === 0) throw new RangeError("index 7 of 5");
    each(register, value);
  });
};

new DeviceThread(workerData).run();
