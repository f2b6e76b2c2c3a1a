import type { Bdf } from "../base/units.ts";
import type { SplitQueue } from "./queue.ts";

/** Functions that are assigned, and so tracked: each one's number in the software IOMMU, or undefined behind another. */
export type Assigned = ReadonlyMap<Bdf, number | undefined>;
/** Their numbers, of those behind our IOMMU. */
export const gatesOf = (assigned: Assigned): number[] =>
  [...assigned.values()].filter((gate) => gate !== undefined);

/** A virtio device model, without its transport. Register offsets are relative to its device configuration. */
export interface VirtioDevice {
  /** VIRTIO 1.2 section 5: device type. */
  readonly id: number;
  /** Bits 0..63, VERSION_1 included. */
  readonly features: bigint;
  /** Largest size of each queue. */
  readonly queueSizes: readonly number[];
  readonly configSize: number;
  /** Changes of the device configuration that no write of the driver's made. */
  readonly configGeneration: number;
  /** Whether these features, a subset of those offered, may go together (FEATURES_OK). */
  accepts(features: bigint): boolean;
  /** FEATURES_OK: the features are final. */
  start(features: bigint): void;
  configRead(offset: number, into: Uint8Array): void;
  configWrite(offset: number, from: Uint8Array): void;
  /** Serve a queue that was kicked. Throws PeerError when the device needs a reset. */
  kick(index: number, queue: SplitQueue): void;
  /** Status 0: the driver starts over, or has gone. */
  reset(): void;
  /** After reset(), when the whole machine is reset. */
  machineReset(): void;
}

/** A PCI function without its transport: what the VMM's bus does to it. Sizes are 1, 2, 4 or 8 bytes. */
export interface PciFunction {
  configRead(offset: number, size: number): number;
  configWrite(offset: number, size: number, value: number): void;
  /** `address` as the VMM has it: absolute while the BAR is mapped. */
  barRead(address: number, size: number): bigint;
  barWrite(address: number, size: number, value: bigint): void;
  /** Reset of the whole machine. */
  reset(): void;
}
