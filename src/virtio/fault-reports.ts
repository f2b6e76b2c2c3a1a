import { NotGuestRam } from "../base/errors.ts";
import type { GuestAccess } from "../memory/guest-memory.ts";
import type { Fault } from "../tracking/faults.ts";
import {
  VIRTIO_IOMMU_FAULT_F_ADDRESS,
  VIRTIO_IOMMU_FAULT_F_READ,
  VIRTIO_IOMMU_FAULT_F_WRITE,
  Fault as WireFault,
} from "../wire/virtio-iommu.ts";
import type { Assigned } from "./device.ts";
import { type Chain, lengthOf, MalformedChain, type SplitQueue, scatter } from "./queue.ts";

/** Writes fault reports into buffers of the event queue: VIRTIO 1.2 section 5.13.6.9, whose sentences are quoted. */
export class FaultReports {
  readonly #memory: GuestAccess;
  readonly #assigned: Assigned;
  /** Buffers that no report fits in: what a correct driver never gives. */
  badBuffers = 0;

  constructor(memory: GuestAccess, assigned: Assigned) {
    this.#memory = memory;
    this.#assigned = assigned;
  }

  /**
   * Whether the guest is told. "If no buffer is available, the device can either wait for one to be consumed, or drop the
   * event." It is dropped: the driver may never give one. Throws PeerError when the ring is broken.
   */
  report(queue: SplitQueue, { device, address, access, reason }: Fault): boolean {
    const endpoint = [...this.#assigned].find(([, gate]) => gate === device)?.[0];
    // "The device SHOULD write a valid endpoint ID in endpoint." This function has gone since.
    if (endpoint === undefined) return false;
    const direction = access === "write" ? VIRTIO_IOMMU_FAULT_F_WRITE : VIRTIO_IOMMU_FAULT_F_READ;
    // "The device SHOULD set reserved and reserved1 to zero." "The device SHOULD set undefined flags to zero."
    const event = WireFault.encode({
      ...{ reason, endpoint, address },
      flags: direction | VIRTIO_IOMMU_FAULT_F_ADDRESS,
    });
    // Bounded: a driver on another CPU could add bad buffers for ever.
    for (let tries = 0; tries < queue.size; tries++) {
      const chain = this.#next(queue);
      if (chain === undefined) return false;
      const written = chain === "malformed" ? 0 : this.#fill(chain, event);
      if (chain !== "malformed") queue.push(chain.head, written);
      if (written > 0) return true;
      this.badBuffers++;
    }
    return false;
  }

  #next(queue: SplitQueue): Chain | "malformed" | undefined {
    try {
      return queue.pop();
    } catch (error) {
      if (!(error instanceof MalformedChain)) throw error;
      queue.push(error.head, 0);
      return "malformed";
    }
  }

  /** "If a buffer is too small to contain the fault report, the device SHOULD NOT use multiple buffers to describe it." */
  #fill({ writable }: Chain, event: Uint8Array): number {
    if (lengthOf(writable) < event.length) return 0;
    try {
      return scatter(this.#memory, writable, event);
    } catch (error) {
      if (!(error instanceof NotGuestRam)) throw error;
      return 0;
    }
  }
}
