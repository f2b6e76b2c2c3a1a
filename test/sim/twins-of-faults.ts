import { FRAME_SIZE } from "../../src/base/units.ts";
import type { DmaAccess } from "../../src/memory/guest-memory.ts";
import type { Settings } from "../../src/sim/settings.ts";
import type { Twin } from "../../src/sim/world.ts";
import type { TrackingCounters } from "../../src/tracking/counters.ts";
import type { Fault, FaultLog } from "../../src/tracking/faults.ts";
import { DeviceGate, SoftwareIommu } from "../../src/tracking/software-iommu.ts";
import {
  VIRTIO_IOMMU_FAULT_R_DOMAIN,
  VIRTIO_IOMMU_FAULT_R_MAPPING,
  VIRTIO_IOMMU_FAULT_R_UNKNOWN,
} from "../../src/wire/virtio-iommu.ts";
import type { BrokenTwin } from "./twins.ts";

const FAULTS: Partial<Settings> = { strays: 4, hostile: false, frontEnd: "virtio-iommu" };

type Report = (fault: Fault) => boolean;

/** `tell`: how faults are told of, from what would be right. `rarely`: one in a few times, in each machine the same. */
function telling(
  tell: (report: Report, rarely: () => boolean, counters: TrackingCounters) => Report,
  found: RegExp,
  settings = FAULTS,
): BrokenTwin {
  const twin = (): Twin => {
    const rarely = oneInFive();
    class TellingIommu extends SoftwareIommu {
      override faultLog(counters: TrackingCounters): FaultLog {
        const log = super.faultLog(counters);
        const { serve } = log;
        log.serve = (report) => serve.call(log, tell(report, rarely, counters));
        return log;
      }
    }
    return { backend: { makeIommu: (...args) => new TellingIommu(...args) } };
  };
  return { twin, found, settings };
}

function oneInFive(): () => boolean {
  let times = 0;
  return () => ++times % 5 === 0;
}

/** Does not always tell. */
class SilentGate extends DeviceGate {
  override fault(address: number, access: DmaAccess): void {
    if (address % 5 > 0) super.fault(address, access);
  }
}

const NOT_TOLD = /the guest finds none|does not come to rest|is reported that was not/;
const NOT_SO = /is reported that was not/;

/** An IOMMU that at times does not know of a device that may fault. */
function forgettingTwin(): Twin {
  const rarely = oneInFive();
  class ForgettingIommu extends SoftwareIommu {
    override isFaultCapable(device: number): boolean {
      return !rarely() && super.isFaultCapable(device);
    }
  }
  return { backend: { makeIommu: (...args) => new ForgettingIommu(...args) } };
}

export const faultTwins: Readonly<Record<string, BrokenTwin>> = {
  "a host that refuses a fault of a fault-capable device": {
    twin: forgettingTwin,
    found: /^a fault on frame \d+ is refused/,
    settings: { faultCapable: true, hostile: false },
  },
  "a device that says that it reported a fault, and has not": telling(
    (report, rarely) => (fault) => rarely() || report(fault),
    NOT_TOLD,
  ),
  "a device that drops a fault though there is room": telling(
    (report, rarely) => (fault) => !rarely() && report(fault),
    /are dropped, and there was room/,
  ),
  "a device that neither reports a fault nor counts it": {
    twin: { makeGate: (...args) => new SilentGate(...args) },
    found: /^of \d+ faults/,
    settings: FAULTS,
  },
  "a device that counts a fault twice": telling(
    (report, _, counters) => (fault) => {
      counters.faultsReported++;
      return report(fault);
    },
    /: too many$/,
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
    (report) => (fault) => report({ ...fault, reason: VIRTIO_IOMMU_FAULT_R_MAPPING }),
    NOT_SO,
  ),
  "a device that knows no DOMAIN": telling(
    (report) => (fault) =>
      report({
        ...fault,
        reason: fault.reason === VIRTIO_IOMMU_FAULT_R_DOMAIN ? VIRTIO_IOMMU_FAULT_R_UNKNOWN : fault.reason,
      }),
    NOT_SO,
  ),
  "a device that reports a write as a read": telling(
    (report) => (fault) => report({ ...fault, access: "read" }),
    NOT_SO,
  ),
  "a device that reports the page in place of the address": telling(
    (report) => (fault) => report({ ...fault, address: fault.address - (fault.address % FRAME_SIZE) }),
    NOT_SO,
  ),
};
