import type { Clock } from "../base/clock.ts";
import type { HostError } from "../base/errors.ts";
import type { Gpa } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import type { UnpinPolicy } from "../policy/policy.ts";
import type { Speculation } from "../policy/speculation/speculation.ts";
import type { TrackingCounters } from "./counters.ts";
import type { DmaTrackingTable } from "./dtt.ts";
import type { AssignedBus, BeforeActivation } from "./life.ts";
import type { Pinner } from "./pinner.ts";
import type { PinObserver } from "./pins.ts";
import type { SoftwareIommu } from "./software-iommu.ts";
import type { Speculator, SpeculatorOptions } from "./speculator.ts";

export interface TrackerOptions {
  readonly memory: GuestMemory;
  readonly pinner: Pinner;
  readonly iommu: SoftwareIommu;
  /** At first, as the quota. */
  readonly policy: UnpinPolicy;
  readonly clock: Clock;
  readonly counters: TrackingCounters;
  /** Frames this guest may have pinned at once; Infinity for no limit. */
  readonly quota: number;
  readonly beforeActivation: BeforeActivation;
  /** No driver ever says what is in use: all RAM is pinned as a whole, at once and for good. */
  readonly wholeRam?: boolean;
  /** How long a driver may take to turn PIN on, from power-on or a machine reset; Infinity for ever. */
  readonly activationTimeout?: number;
  readonly bus?: AssignedBus;
  readonly observers?: readonly PinObserver[];
  /** PassLimit.pressure, as the file of a policy says; 0 without. */
  readonly pressure?: (file: string) => number;
  /** At first; none without. */
  readonly speculation?: Speculation;
  /** Told why the host has refused to pin what was asked for. */
  readonly refused?: (error: HostError) => void;
  readonly speculationStopped?: SpeculatorOptions["stopped"];
  /** The table's view of a unit, and what pins unasked; tests of the checkers put broken ones here. */
  readonly openTable?: (memory: GuestMemory, root: Gpa, levels: number) => DmaTrackingTable;
  readonly makeSpeculator?: (options: SpeculatorOptions) => Speculator;
}
