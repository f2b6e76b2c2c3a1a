import { HostError, UserError } from "../base/errors.ts";
import { type Bdf, FRAME_SIZE } from "../base/units.ts";
import { monotonicClock } from "../host/clock.ts";
import { canExceedMemlock, MEMLOCK_SLACK, memlockFix, memlockLimit, raiseMemlock } from "../host/limits.ts";
import { PresentMappings } from "../host/present-mappings.ts";
import { counters } from "../memory/counters.ts";
import { GuestMemory, type GuestRegion } from "../memory/guest-memory.ts";
import { SharedWords } from "../memory/shared-words.ts";
import type { IntervalChoice } from "../policy/pass-interval.ts";
import type { BeforeActivation } from "../tracking/life.ts";
import type { Pinner } from "../tracking/pinner.ts";
import { SoftwareIommu } from "../tracking/software-iommu.ts";
import {
  TRACKING_COUNTERS,
  Tracker,
  type TrackerOptions,
  type TrackingCounters,
} from "../tracking/tracker.ts";
import type { IdleRange, IdleSlice } from "../tracking/unpin-passes.ts";
import { gatesOf, type PciFunction } from "../virtio/device.ts";
import { createFrontEnd, type FrontEnd, type FrontEndName } from "../virtio/front-end.ts";
import type { DirtyCommands } from "./dirty.ts";
import { PinLog } from "./pin-log.ts";
import { createPinner, type DeviceSpace, type PinnerName } from "./pinners.ts";
import { ringAddresses } from "./ring-addresses.ts";
import { Speculating } from "./speculating.ts";
import { hasDriver, type Strategy } from "./strategy.ts";
import { Unpinning } from "./unpinning.ts";

/** An assigned function. */
export interface AssignedFunction {
  readonly bdf: Bdf;
  /** Its number in the software IOMMU, if its DMA goes through that. */
  readonly gate?: number;
  /** Its DMA faults are no failures: what it touches is pinned then. */
  readonly faultCapable?: boolean;
  /** It is not plugged now, and does no DMA; who comes there is tracked. */
  readonly absent?: boolean;
}

export interface HostSideData {
  readonly iommu: SharedArrayBuffer;
  readonly counters: SharedArrayBuffer;
  /** Functions that are tracked from the start. */
  readonly assigned: readonly AssignedFunction[];
  readonly strategy: Strategy;
  /** Where the guest's driver finds us. */
  readonly frontEnd: FrontEndName;
  /** Whether this is a QEMU, which has its own idea of a function's addresses. */
  readonly qemu: boolean;
  /** With a driver in the guest. */
  readonly beforeActivation: BeforeActivation;
  /** Infinity for none. */
  readonly activationTimeout: number;
  readonly pinner: PinnerName;
  /** Of a real device. */
  readonly space?: DeviceSpace | undefined;
  readonly policy: string;
  readonly interval: IntervalChoice;
  readonly speculate: string;
  /** Frames; Infinity for no limit. */
  readonly quota: number;
  /** When the recording of pins began; null: there is none. */
  readonly recordingSince: number | null;
}

/** Answer to "started": what stood before the guest's first instruction. */
export interface Started {
  /** Time spent pinning before the guest starts, in ms. */
  readonly pinMs: number;
  /** 0 until the memory map is known: ask again. */
  readonly ramBytes: number;
  /** All RAM is to be pinned first, and is not yet: ask again. */
  readonly pinning: boolean;
  readonly kernelSource: Pinner["kernelSource"];
}
/** Answer to "stop". */
export interface Stopped {
  /** Pages that the kernel counted as pinned when the backend began, and after everything was released. */
  readonly kernelPagesBefore: number | null;
  readonly kernelPagesAfter: number | null;
  /** Requests and register accesses that a correct guest never makes. */
  readonly peerErrors: number;
}

/** How long the kernel may take to let go of pins: io_uring releases up to 1 s late on Linux 6.1. */
const RELEASE_LIMIT_MS = 3000;

const NO_DRIVER =
  "no driver of the guest has turned pinning on in time, and an assigned device is in use: pinning all of the guest's memory";

/** Memory of a device, or memory that was plugged where no RAM was expected. */
const BEYOND_TABLE = "QEMU shares memory beyond the guest's RAM: no device of ours can reach it";

/**
 * The backend without its loop: the function that one guest finds and all behind it. Whoever owns it calls work() between
 * requests, and sleeps no longer than that says.
 */
export class HostSide {
  readonly memory = new GuestMemory();
  readonly function: PciFunction;
  /** For whoever maps memory that is pinned in the kernel. */
  readonly present: PresentMappings | undefined;
  /** The operator's, each no longer than a slice of an unpin pass. */
  readonly commands = {
    setPolicy: (choice: string) => this.#unpinning.setPolicy(this.#tracker, choice),
    setSpeculation: (choice: string) => this.#speculating.set(this.#tracker, choice),
    setInterval: (choice: IntervalChoice) => this.#unpinning.setInterval(choice),
    policyState: () => this.#tracker.policy.state?.() ?? {},
    setQuota: (frames: number) => {
      this.#tracker.setQuota(frames);
      this.#frontEnd.quotaChanged();
      this.#raiseMemlock(this.memory.size);
      this.#tellMemlock();
    },
    park: (parked: boolean) => this.#tracker.parkByOperator(parked),
    unpinIdle: (range: IdleRange) => this.#unpinIdle(range),
  };
  readonly #data: HostSideData;
  readonly #warn: (text: string) => void;
  readonly #iommu: SoftwareIommu;
  readonly #assigned: Map<Bdf, number | undefined>;
  readonly #absent = new Set<Bdf>();
  readonly #pinner: Pinner;
  readonly #tracker: Tracker;
  readonly #frontEnd: FrontEnd;
  readonly #kernelPagesBefore: number | null;
  readonly #unpinning: Unpinning;
  readonly #pinLog: PinLog | undefined;
  readonly #speculating: Speculating;
  #pinTime = 0;
  readonly #counters: TrackingCounters;
  readonly #toldRefusals = new Set<string>();
  /** It has been told that not all RAM can be pinned. */
  #toldStopped = false;
  /** Why the pins that should stand before the guest starts do not; told by started(). */
  #startFailure: HostError | undefined;
  #started = false;
  /** What the memlock limit has to be, where it could not be raised so far. */
  #memlockShort: number | undefined;

  /** `tell`: warned of what the host refused while nobody waited for an answer, and given what is recorded. */
  constructor(
    data: HostSideData,
    tell: (kind: "warning" | "log", text: string) => void,
    openTable?: TrackerOptions["openTable"],
  ) {
    const warn = (text: string) => tell("warning", text);
    this.#data = data;
    this.#warn = warn;
    this.#iommu = new SoftwareIommu(data.iommu, monotonicClock);
    this.#iommu.setOpen(data.strategy === "none");
    this.#pinner = createPinner(data.pinner, data.space);
    const without = this.#pinner.mapsOnce
      ? "what is hot is not mapped as one"
      : "each page is pinned for itself";
    this.present =
      data.pinner === "software" ? undefined : new PresentMappings((reason) => warn(`${without}: ${reason}`));
    this.#assigned = new Map(data.assigned.map(({ bdf, gate }) => [bdf, gate]));
    this.#kernelPagesBefore = this.#pinner.kernelPinnedPages();
    this.#counters = counters(TRACKING_COUNTERS, data.counters);
    this.#unpinning = new Unpinning(data, this.#counters, monotonicClock.now(), warn);
    this.#speculating = new Speculating(data.speculate, warn);
    for (const { gate, faultCapable } of data.assigned)
      if (gate === undefined) this.#counters.dmaUnseen = 1;
      else this.#iommu.setFaultCapable(gate, faultCapable ?? false);
    const { recordingSince } = data;
    this.#pinLog =
      recordingSince === null ? undefined : new PinLog(recordingSince, (lines) => tell("log", lines));
    const unpinning = this.#unpinning.ofTracker;
    this.#tracker = new Tracker({
      memory: this.memory,
      pinner: this.#pinner,
      iommu: this.#iommu,
      ...unpinning,
      ...this.#speculating.ofTracker,
      observers: [...unpinning.observers, ...(this.#pinLog ? [this.#pinLog] : [])],
      clock: monotonicClock,
      counters: this.#counters,
      // Of what is pinned on request.
      quota: data.strategy === "coiommu" ? data.quota : Number.POSITIVE_INFINITY,
      ...lifeOf(data),
      bus: {
        mastering: () => this.#isMastering(),
        quiet: () => this.#allAreKnown() && !this.#isMastering(),
      },
      refused: (error) => this.#refused(error),
      ...(openTable && { openTable }),
    });
    this.#frontEnd = createFrontEnd(hasDriver(data.strategy) ? data.frontEnd : "virtio-iommu", {
      memory: this.memory,
      tracker: this.#tracker,
      assigned: this.#assigned,
      pinPage: hasDriver(data.strategy),
      hostError: (error) => this.#hostFailed(error),
    });
    this.function = this.#frontEnd.pci;
  }

  setMemory(regions: readonly GuestRegion[]): void {
    const before = monotonicClock.now();
    const covered = regions.filter(({ gpa, size }) => gpa + size <= this.#iommu.frames * FRAME_SIZE);
    if (covered.length < regions.length) this.#warn(BEYOND_TABLE);
    const range = this.#data.qemu ? ringAddresses(covered) : undefined;
    if (range) this.#frontEnd.setInputRange(range);
    this.#raiseMemlock(covered.reduce((sum, { size }) => sum + size, 0));
    try {
      this.#tracker.setMemory(covered);
    } catch (error) {
      if (!(error instanceof HostError)) throw error;
      this.#hostFailed(error);
    }
    if (!this.#started) this.#pinTime += monotonicClock.now() - before;
  }

  /** What all pins of `ramBytes` may need of the memlock limit. */
  #memlockNeed(ramBytes: number): number {
    return Math.min(ramBytes, this.#tracker.quota * FRAME_SIZE) + MEMLOCK_SLACK;
  }

  #raiseMemlock(ramBytes: number): void {
    if (this.#pinner.kernelSource === "none" || this.#data.strategy === "none") return;
    const need = this.#memlockNeed(ramBytes);
    this.#memlockShort = raiseMemlock(need) ? undefined : need;
  }

  #tellMemlock(): void {
    if (this.#memlockShort === undefined) return;
    this.#warn(
      `pins beyond the memlock limit of this process, ${Math.floor(memlockLimit() / 1024)} KiB, will be refused: ` +
        `raise it (${memlockFix(this.#memlockShort)}), or run as root`,
    );
  }

  /**
   * A function is plugged, or gone. The guest's driver asks which ones are assigned whenever one binds. What a function
   * that is gone had mapped is unpinned as ever: when its driver has unmapped it. It is attached to no domain any more.
   */
  assign({ bdf, gate, faultCapable = false, absent = false }: AssignedFunction): void {
    this.#frontEnd.reportFaults(); // of what had this gate before
    this.#assigned.set(bdf, gate);
    if (absent) this.#absent.add(bdf);
    else this.#absent.delete(bdf);
    if (gate === undefined) {
      this.#counters.dmaUnseen = 1;
      return;
    }
    this.#iommu.setFaultCapable(gate, faultCapable);
    this.#tracker.remapping.add(gate);
  }
  unassign(bdf: Bdf): void {
    const gate = this.#assigned.get(bdf);
    this.#assigned.delete(bdf);
    this.#absent.delete(bdf);
    if (gate !== undefined) this.#tracker.remapping.remove(gate);
  }

  /** The thread behind a gate has ended, told to or not. */
  deviceEnded(gate: number): void {
    this.#iommu.deviceEnded(gate);
  }

  /** Answer devices that ask for frames which they touch, and tell the guest of DMA faults. */
  serveDevices(): void {
    this.#frontEnd.reportFaults();
    this.#iommu.serveRequests((...asked) => this.#tracker.touched(...asked));
  }

  /** At most one slice of what is due, of each kind. Returns for how many ms nothing will be due. */
  work(): number {
    this.#live();
    const now = monotonicClock.now();
    this.#unpinning.work(this.#tracker, monotonicClock);
    const dueAt = Math.min(this.#unpinning.dueAt, this.#tracker.dueAt);
    return Math.max(0, (dueAt - now) / 1e6);
  }

  /** What the guest's life brings about without a word of its driver: at most one slice of pinning everything. */
  #live(): void {
    const before = monotonicClock.now();
    if (before < this.#tracker.dueAt) return;
    const { life } = this.#tracker;
    try {
      this.#tracker.live();
      if (this.#counters.backgroundStopped === 0) this.#toldStopped = false;
      else if (this.#started) this.#stopped("the quota is less than the guest has");
    } catch (error) {
      if (!(error instanceof HostError)) throw error;
      if (this.#started) this.#stopped(this.#explain(error));
      else this.#startFailure = error;
    }
    if (!this.#started) this.#pinTime += monotonicClock.now() - before;
    if (life === "undecided" && this.#tracker.life === "static") this.#warn(NO_DRIVER);
  }

  /** Told once, though it is tried again and again. */
  #stopped(why: string): void {
    if (!this.#toldStopped) this.#warn(`not all of the guest's memory is pinned: ${why}`);
    this.#toldStopped = true;
  }

  /** There is no function of which it cannot be known whether it does DMA. */
  #allAreKnown(): boolean {
    return gatesOf(this.#assigned).length + this.#absent.size === this.#assigned.size;
  }

  #isMastering(): boolean {
    return gatesOf(this.#assigned).some((gate) => this.#iommu.isMastering(gate));
  }

  /** Once begun it goes on, so that what has gone is told; what may not go any more has stayed. */
  #unpinIdle(range: IdleRange): IdleSlice {
    const { from } = range;
    if (from === 0 && !this.#tracker.active)
      throw new UserError("no driver of the guest is active: its devices may use all that is pinned", 1);
    if (from === 0 && this.#tracker.parked) throw new UserError("unpinning is parked", 1);
    return this.#tracker.unpinIdle(range);
  }

  /** Throws UserError when what should be pinned by now cannot be. */
  started(): Started {
    if (this.#startFailure) throw new UserError(this.#explain(this.#startFailure), 1);
    const { backgroundFrames, backgroundPinned } = this.#counters;
    if (backgroundFrames > this.#tracker.quota)
      throw new UserError(
        `--before-activation all pins all of the guest's memory: --quota cannot be below ${backgroundFrames} frames`,
        1,
      );
    const pinning = backgroundPinned < backgroundFrames;
    const started = this.memory.size > 0 && !pinning;
    if (started && !this.#started) this.#tellMemlock();
    this.#started = started;
    return {
      pinMs: this.#pinTime / 1e6,
      ramBytes: this.memory.size,
      pinning,
      kernelSource: this.#pinner.kernelSource,
    };
  }

  readonly dirtyCommands: DirtyCommands = {
    dirtyStart: () => {
      if (this.#data.strategy === "none")
        throw new UserError("devices may write all memory: there is no IOMMU that would tell what", 1);
      this.#tracker.dirty.start();
      return null;
    },
    dirtyHarvest: () => {
      if (!this.#tracker.dirty.on) throw new UserError("dirty tracking has not been started", 1);
      return this.#tracker.dirty.harvest();
    },
    dirtyStop: () => {
      this.#tracker.dirty.stop();
      return null;
    },
  };

  /** Release everything. `disconnect`: nothing of the guest is served any more when it returns. */
  stop(disconnect: () => void): Stopped {
    this.#tracker.sampleKernel();
    this.#pinLog?.flush();
    disconnect();
    this.memory.setRegions([]);
    return {
      kernelPagesBefore: this.#kernelPagesBefore,
      kernelPagesAfter: this.#releaseAll(),
      peerErrors: this.#frontEnd.peerErrors,
    };
  }

  /** Told once for each reason: a guest asks again and again. */
  #refused(error: HostError): void {
    if (this.#toldRefusals.has(error.errno)) return;
    this.#toldRefusals.add(error.errno);
    this.#warn(this.#explain(error));
  }

  #explain(error: HostError): string {
    const text = "the host cannot pin guest memory";
    if (error.errno !== "ENOMEM" || canExceedMemlock()) return `${text}: ${error.message}`;
    const need = this.#memlockNeed(this.memory.size);
    const limit = `the memlock limit of this process is ${Math.floor(memlockLimit() / 1024)} KiB`;
    return memlockLimit() < need
      ? `${text}: ${limit}; raise it (${memlockFix(need)}), or run as root`
      : `${text}: ${error.message}; ${limit}, and what other processes of this user have pinned counts too`;
  }

  #hostFailed(error: HostError): void {
    if (this.#started) this.#warn(this.#explain(error));
    else this.#startFailure = error;
  }

  /** Release every pin, and wait until the kernel no longer counts them. */
  #releaseAll(): number | null {
    const deadline = monotonicClock.now() + RELEASE_LIMIT_MS * 1e6;
    const nothing = new SharedWords(new SharedArrayBuffer(4));
    this.#pinner.close();
    this.present?.close();
    let pages = this.#pinner.kernelPinnedPages();
    while (pages !== this.#kernelPagesBefore && monotonicClock.now() < deadline) {
      nothing.wait(0, 0, 10);
      pages = this.#pinner.kernelPinnedPages();
    }
    this.#pinner.close();
    return pages;
  }
}

function lifeOf({ strategy, beforeActivation, activationTimeout }: HostSideData) {
  if (hasDriver(strategy)) return { beforeActivation, activationTimeout };
  return strategy === "static"
    ? ({ beforeActivation: "all", wholeRam: true } as const)
    : ({ beforeActivation: "none" } as const);
}
