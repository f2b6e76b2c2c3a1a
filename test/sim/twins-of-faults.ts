import type { Settings } from "../../src/sim/settings.ts";
import type { TrackingCounters } from "../../src/tracking/counters.ts";
import type { Fault, FaultLog } from "../../src/tracking/faults.ts";
import { SoftwareIommu } from "../../src/tracking/software-iommu.ts";
import type { BrokenTwin } from "./twins.ts";

const FAULTS: Partial<Settings> = { strays: 4, hostile: false, frontEnd: "virtio-iommu" };

/** How faults are told of, from what would be right. */
type Telling = (report: (fault: Fault) => boolean) => (fault: Fault) => boolean;

function telling(tell: Telling, found: RegExp, settings = FAULTS): BrokenTwin {
  class Telling extends SoftwareIommu {
    override faultLog(counters: TrackingCounters): FaultLog {
      const log = super.faultLog(counters);
      const { serve } = log;
      log.serve = (report) => serve.call(log, tell(report));
      return log;
    }
  }
  return { twin: { backend: { makeIommu: (...args) => new Telling(...args) } }, found, settings };
}

let turn = 0;
const oneIn = (n: number) => ++turn % n === 0;
const NOT_TOLD = /the guest finds none|does not come to rest|is reported that was not/;
const NOT_SO = /is reported that was not/;

export const faultTwins: Readonly<Record<string, BrokenTwin>> = {
  "a device that says that it reported a fault, and has not": telling(
    (report) => (fault) => oneIn(5) || report(fault),
    NOT_TOLD,
  ),
  "a device that drops a fault though there is room": telling(
    (report) => (fault) => !oneIn(5) && report(fault),
    /are dropped, and there was room/,
  ),
  "a device that reports a fault twice": telling(
    (report) => (fault) => report(fault) && report(fault),
    /reported twice|is reported that was not/,
  ),
  "a device that reports a fault of another endpoint": telling(
    (report) => (fault) => report({ ...fault, device: 0 }),
    NOT_SO,
    { ...FAULTS, devices: 2 },
  ),
  "a device that reports every fault as one of a mapping": telling(
    (report) => (fault) => report({ ...fault, reason: 2 }),
    NOT_SO,
  ),
  "a device that knows no DOMAIN": telling(
    (report) => (fault) => report({ ...fault, reason: fault.reason === 1 ? 0 : fault.reason }),
    NOT_SO,
  ),
  "a device that reports a write as a read": telling(
    (report) => (fault) => report({ ...fault, access: "read" }),
    NOT_SO,
  ),
  "a device that reports the page in place of the address": telling(
    (report) => (fault) => report({ ...fault, address: fault.address - (fault.address % 4096) }),
    NOT_SO,
  ),
};
