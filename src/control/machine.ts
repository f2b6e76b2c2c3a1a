import type { Errno } from "../base/errors.ts";
import type { Bdf, Nanoseconds } from "../base/units.ts";
import type { StoreOptions } from "../device/block-store.ts";
import type { DeviceCounters } from "../device/counters.ts";
import type { DriverCounters } from "../driver/counters.ts";
import type { IntervalChoice } from "../policy/pass-interval.ts";
import type { BeforeActivation } from "../tracking/life.ts";
import type { TrackingCounters } from "../tracking/tracker.ts";
import type { FrontEndName } from "../virtio/front-end.ts";
import type { Balloon } from "./balloon.ts";
import type { DirtyFrames } from "./dirty.ts";
import type { Started, Stopped } from "./host-side.ts";
import type { Operator } from "./operator.ts";
import type { PinnerName } from "./pinners.ts";
import type { PluggedDisks } from "./plugged-disks.ts";
import type { RealDiskOptions } from "./real-disk.ts";
import type { Recording } from "./recording.ts";
import type { RunResult, WorkloadResult } from "./result.ts";
import type { Strategy } from "./strategy.ts";
import type { Workload } from "./workload.ts";

/** What every machine is made from. */
export interface MachineOptions {
  readonly memoryMiB: number;
  readonly cpus: number;
  readonly strategy: Strategy;
  /** The PCI function at which guest and host meet; by default the virtio-iommu. */
  readonly frontEnd?: FrontEndName;
  readonly policy: string;
  readonly interval: IntervalChoice;
  /** As `--speculate` takes it; by default off. */
  readonly speculate?: string;
  readonly quota: number;
  readonly pinner: PinnerName;
  readonly disk: StoreOptions;
  /** A disk of this machine instead; only the embedded guest can have it. */
  readonly device?: RealDiskOptions;
  /** With strategy `coiommu`: what is pinned before a driver turns PIN on, and how long it may take to (Infinity: for ever). */
  readonly beforeActivation: BeforeActivation;
  readonly activationTimeout: number;
  /** Assigned devices may fault on their buffers, which nobody maps; their rings are tracked. */
  readonly faultCapable?: boolean;
  /** Writes down what is mapped and pinned. */
  readonly recording?: Recording;
  readonly onWarning?: (text: string) => void;
  /** Told what is done before the guest starts. */
  readonly onProgress?: (text: string) => void;
  /** Entries of threads; tests of the checkers put broken ones here. */
  readonly backendEntry?: URL;
  readonly deviceEntry?: URL;
}

/** What the guest's driver has counted so far, over all CPUs. */
export interface DriverState {
  readonly map: number;
  readonly unmap: number;
  readonly framesMapped: number;
  readonly framesUnmapped: number;
  readonly pinRequests: number;
  readonly mapRequests: number;
  readonly unmapRequests: number;
  /** Notifications of the virtio-iommu. */
  readonly exits: number;
}

export interface Booted {
  /** Release of the guest's kernel; null where there is none. */
  readonly kernel: string | null;
  /** When user space ran, by the monotonic clock. */
  readonly userspaceAt: Nanoseconds;
}

export interface Worked {
  readonly workload: WorkloadResult;
  /** The driver's counters when the workload had run for a second, and at its end; null without a driver. */
  readonly first: DriverState | null;
  readonly last: DriverState | null;
}

/** What was left when everything had ended. */
export interface MachineEnd {
  readonly backend: Stopped;
  /** How often the host refused an assigned device its store, by errno; the guest saw I/O errors. */
  readonly hostErrors: readonly (readonly [Errno, number])[];
}

/** A device that the guest has now. */
export interface AssignedDevice {
  readonly bdf: Bdf;
  /** Null where it is not a device of ours. */
  readonly counters: DeviceCounters | null;
}

/** What of a guest is seen and changed from outside while it lives. */
export interface LiveMachine {
  readonly name: RunResult["guest"]["machine"];
  readonly started: Started;
  readonly pins: TrackingCounters;
  /** Of the software IOMMU, to be read: claimsOf(). */
  readonly iommuTable: SharedArrayBuffer;
  readonly assigned: readonly AssignedDevice[];
  /** That come and go while the guest runs; null where none can. */
  readonly disks: PluggedDisks | null;
  /** What each CPU's driver counts, where it is in memory of ours; null where it is the guest's. */
  readonly drivers: readonly DriverCounters[] | null;
  readonly operator: Operator;
  readonly dirty: DirtyFrames;
  /** Null where there is none. */
  readonly balloon: Balloon | null;
}

/** A guest with assigned devices, and what serves them. Made with the guest paused; the methods follow each other. */
export interface Machine extends LiveMachine {
  readonly host: RunResult["host"];
  /** Of all assigned devices, those that have gone too. */
  readonly devices: readonly DeviceCounters[];
  /** Rejects when a part fails that should run until close(). */
  readonly failed: Promise<never>;
  /** Resolves when the guest executes. */
  resume(): Promise<void>;
  /** Until the drivers of the assigned devices run, tracked if the strategy says so. */
  boot(): Promise<Booted>;
  work(workload: Workload): Promise<Worked>;
  /** Let the devices' drivers unmap all; the driver's last word, and its live mappings. Null without a driver. */
  shutDown(): Promise<(DriverState & { readonly live: number }) | null>;
  /** End all of it; idempotent. */
  close(): Promise<MachineEnd>;
}
