import { CrosvmFunction, type CrosvmFunctionOptions } from "./crosvm-function.ts";
import type { PciFunction } from "./device.ts";
import { EVENT_QUEUE, VirtioIommu, type VirtioIommuOptions } from "./iommu.ts";
import type { InputRange } from "./iommu-requests.ts";
import { VirtioPciFunction } from "./pci.ts";

/** The PCI functions that the backend can answer as. */
export const FRONT_ENDS = ["virtio-iommu", "crosvm"] as const;
export type FrontEndName = (typeof FRONT_ENDS)[number];

/** One of them, and what the backend tells the guest through it unasked, as far as it can be told. */
export interface FrontEnd {
  readonly pci: PciFunction;
  /** Requests and register accesses that a correct guest never makes. */
  readonly peerErrors: number;
  reportFaults(): void;
  quotaChanged(): void;
  setInputRange(range: InputRange): void;
}

export function createFrontEnd(
  name: FrontEndName,
  options: VirtioIommuOptions & CrosvmFunctionOptions,
): FrontEnd {
  return name === "crosvm" ? crosvm(options) : virtioIommu(options);
}

function virtioIommu(options: VirtioIommuOptions): FrontEnd {
  const device = new VirtioIommu(options);
  const pci = new VirtioPciFunction(device, options.memory);
  return {
    pci,
    get peerErrors() {
      return pci.peerErrors + device.badRequests;
    },
    reportFaults: () => pci.withQueue(EVENT_QUEUE, (queue) => device.reportFaults(queue)),
    quotaChanged: () => device.quotaChanged(),
    setInputRange: (range) => device.setInputRange(range),
  };
}

/** It has neither an event queue, nor a register for the quota, nor domains. */
function crosvm(options: CrosvmFunctionOptions): FrontEnd {
  const pci = new CrosvmFunction(options);
  return {
    pci,
    get peerErrors() {
      return pci.peerErrors;
    },
    reportFaults: () => options.tracker.faults.serve(() => false),
    quotaChanged: () => {},
    setInputRange: () => {},
  };
}
