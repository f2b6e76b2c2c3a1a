import { HostError } from "../base/errors.ts";
import type { Gfn, Nanoseconds } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import type { UnpinPolicy } from "../policy/policy.ts";
import type { Speculation } from "../policy/speculation/speculation.ts";
import type { DirtySlice } from "../tracking/dirty.ts";
import type { AssignedBus, BeforeActivation } from "../tracking/life.ts";
import { framesOf, type Mapping } from "../tracking/mapping-trees.ts";
import type { PinObserver } from "../tracking/pins.ts";
import { SoftwareIommu } from "../tracking/software-iommu.ts";
import { Tracker, type TrackerOptions, type TrackingCounters } from "../tracking/tracker.ts";
import type { Assigned } from "../virtio/device.ts";
import { createFrontEnd, type FrontEnd, type FrontEndName } from "../virtio/front-end.ts";
import { VIRTIO_IOMMU_S_OK } from "../wire/virtio-iommu.ts";
import type { Bus } from "./bus.ts";
import { ClaimsModel } from "./claims-model.ts";
import { FakeHost, type HostFaults, type HostObserver } from "./fake-host.ts";
import { HostTurn } from "./host-turn.ts";
import { SteppedMemory, SteppedWords } from "./stepped-memory.ts";
import { Violation } from "./turn.ts";
import type { Actor, Turns } from "./turns.ts";

export interface BackendOptions {
  readonly turns: Turns;
  readonly memory: GuestMemory;
  readonly iommu: SharedArrayBuffer;
  readonly bus: Bus;
  readonly frontEnd: FrontEndName;
  readonly policy: () => UnpinPolicy;
  readonly pressure: () => number;
  readonly speculation: () => Speculation;
  /** When it starts; operators change it by orders. */
  readonly quota: () => number;
  readonly beforeActivation: BeforeActivation;
  readonly activationTimeout: number;
  readonly assignedBus: AssignedBus;
  readonly assigned: Assigned;
  /** Devices that may fault, by number. */
  readonly faultCapable: readonly number[];
  readonly passInterval: Nanoseconds;
  /** Between two harvests of dirty frames; Infinity for none. */
  readonly harvestInterval: Nanoseconds;
  /** Frames in a slice of one. */
  readonly harvestSlice: number;
  readonly counters: TrackingCounters;
  readonly faults: HostFaults;
  readonly observer: HostObserver;
  /** Whether the kick that is served next gets lost on its way. */
  kickLost(): boolean;
  /** Whether the backend dies before its next step. */
  dies(): boolean;
  died(): void;
  /** Loads that are no steps, see SteppedMemory. */
  constant(gpa: number): boolean;
  idleWord(index: number): boolean;
  /** A device asked for a frame when there was no room, or when the host failed. */
  faultMayFail(): void;
  /** The faults of devices are about to be looked for, by `report`. */
  reportFaults(report: () => void): void;
  readonly claims: ClaimsModel;
  /** See FakeHost. */
  readonly mappings: number;
  harvestBegins(): void;
  harvested(slice: DirtySlice): void;
  /** Called between two pieces of work. */
  between(): void;
}

/** What a broken twin replaces. */
export interface BackendParts {
  readonly openTable: NonNullable<TrackerOptions["openTable"]>;
  readonly makeHost: (...args: ConstructorParameters<typeof FakeHost>) => FakeHost;
  readonly makeIommu: (...args: ConstructorParameters<typeof SoftwareIommu>) => SoftwareIommu;
  readonly makeSpeculator: NonNullable<TrackerOptions["makeSpeculator"]>;
  readonly makeTracker: (...args: ConstructorParameters<typeof CheckedTracker>) => CheckedTracker;
}

const KILLED = { killed: true };

/** The production backend, in a thread of its own that can be killed at any step and started again. */
export class Backend implements Actor {
  readonly name = "backend";
  readonly host: FakeHost;
  readonly #o: BackendOptions & Partial<BackendParts>;
  readonly #turn: HostTurn;
  #memory: GuestMemory;
  #iommu: SoftwareIommu;
  #tracker: CheckedTracker;
  #frontEnd: FrontEnd;
  #job: (() => void) | undefined;
  readonly #orders: ((tracker: Tracker) => void)[] = [];
  #rung = false;
  /** The last job answered devices. */
  #answered = false;
  #inPass = false;
  #nextPass: number;
  #inHarvest = false;
  #nextHarvest: number;
  passes = 0;
  harvests = 0;

  constructor(options: BackendOptions & Partial<BackendParts>) {
    this.#o = options;
    this.#nextPass = options.passInterval;
    this.#nextHarvest = options.harvestInterval;
    this.#turn = new HostTurn(options.turns, this, {
      interrupt: () => {
        if (options.dies()) throw KILLED;
      },
    });
    const makeHost = options.makeHost ?? ((...args) => new FakeHost(...args));
    this.host = makeHost(this.#turn, options.faults, options.observer, options.mappings);
    const started = this.#start();
    ({
      memory: this.#memory,
      iommu: this.#iommu,
      tracker: this.#tracker,
      frontEnd: this.#frontEnd,
    } = started);
    this.#job = () => this.#tracker.setMemory(options.memory.regions);
  }

  get tracker(): Tracker {
    return this.#tracker;
  }

  /** A device asks for a frame. */
  ring(): void {
    this.#rung = true;
  }

  /** What an operator wants done. */
  order(order: (tracker: Tracker) => void): void {
    this.#orders.push(order);
  }

  resetMachine(): void {
    this.#job = () => this.#frontEnd.pci.reset();
  }

  ready(): boolean {
    const asked = this.#rung || this.#o.bus.pending.length > 0 || this.#orders.length > 0;
    return this.#job !== undefined || asked || this.#lifeDue || this.#passDue || this.#harvestDue;
  }

  get wakeAt(): number {
    const nextPass = this.#tracker.active ? this.#nextPass : Number.POSITIVE_INFINITY;
    return Math.min(this.#nextHarvest, this.#tracker.dueAt, nextPass);
  }

  get #lifeDue(): boolean {
    return this.#o.turns.time >= this.#tracker.dueAt;
  }

  get #harvestDue(): boolean {
    return this.#inHarvest || this.#o.turns.time >= this.#nextHarvest;
  }

  get #passDue(): boolean {
    return this.#inPass || (this.#tracker.active && this.#o.turns.time >= this.#nextPass);
  }

  resume(): void {
    this.#job ??= this.#nextJob();
    let killed = false;
    this.#turn.on = true;
    try {
      this.#job();
    } catch (error) {
      killed = error === KILLED;
      if (!killed && !(error instanceof HostError)) throw error;
    } finally {
      this.#turn.on = false;
      this.#job = undefined;
      this.#o.turns.changes++;
    }
    if (killed) this.#restart();
    else this.#o.between();
  }

  /** Requests first; an unpin pass in slices between them. */
  #nextJob(): () => void {
    const { bus, kickLost, passInterval, turns } = this.#o;
    if (bus.pending.length > 0)
      return () => bus.deliver(this.#frontEnd.pci, bus.pending[0]!.kick && kickLost());
    // A slice of what is due follows, as in HostSide.work(), however often devices ring.
    const owed = this.#answered && this.#lifeDue;
    this.#answered = false;
    if (this.#rung && !owed)
      return () => {
        this.#rung = false;
        this.#answered = true;
        this.#o.reportFaults(() => this.#frontEnd.reportFaults());
        this.#iommu.serveRequests((...asked) => this.#tracker.touched(...asked));
      };
    const order = this.#orders.shift();
    if (order) return () => order(this.#tracker);
    if (this.#lifeDue) return () => this.#tracker.live();
    if (this.#harvestDue && (!this.#passDue || this.#o.turns.steps % 2 === 0)) return () => this.#harvest();
    return () => {
      if (!this.#inPass) {
        this.#nextPass = turns.time + passInterval;
        this.#tracker.startPass();
      }
      this.#inPass = this.#tracker.slice();
      if (!this.#inPass) this.passes++;
    };
  }

  #harvest(): void {
    const { turns, harvestInterval, harvestSlice, harvestBegins, harvested } = this.#o;
    if (!this.#inHarvest) {
      this.#nextHarvest = turns.time + harvestInterval;
      harvestBegins();
    }
    const slice = this.#tracker.dirty.harvest(harvestSlice);
    this.#inHarvest = slice.more;
    if (!slice.more) this.harvests++;
    harvested(slice);
  }

  /** The kernel keeps the pins, because the control thread holds what they hang on. */
  #restart(): void {
    this.#o.died();
    this.#orders.length = 0;
    this.#o.bus.drop();
    const started = this.#start();
    ({
      memory: this.#memory,
      iommu: this.#iommu,
      tracker: this.#tracker,
      frontEnd: this.#frontEnd,
    } = started);
    this.#inPass = this.#inHarvest = false;
    this.#rung = true; // for what the one that died has not answered
    this.#job = () => {
      this.#memory.setRegions(this.#o.memory.regions);
      this.#tracker.adopt([...this.host.pages].map(({ gfn, handle }): [Gfn, number] => [gfn, handle]));
    };
  }

  #start() {
    const { turns, quota, beforeActivation, counters, openTable, assigned } = this.#o;
    const { activationTimeout, assignedBus } = this.#o;
    const { makeIommu = (...args) => new SoftwareIommu(...args) } = this.#o;
    const { makeTracker = (...args) => new CheckedTracker(...args), makeSpeculator } = this.#o;
    const { faultCapable, faultMayFail } = this.#o;
    const clock = { now: () => turns.time };
    const memory = new SteppedMemory([], this.#turn, { constant: this.#o.constant });
    const iommu = makeIommu(new SteppedWords(this.#o.iommu, this.#turn, this.#o.idleWord), clock);
    for (const device of faultCapable) iommu.setFaultCapable(device, true);
    const tracker = makeTracker(
      {
        ...{
          memory,
          pinner: this.host,
          iommu,
          policy: this.#o.policy(),
          pressure: this.#o.pressure,
          speculation: this.#o.speculation(),
          clock,
          counters,
          quota: quota(),
          beforeActivation,
          activationTimeout,
          bus: assignedBus,
          observers: this.host.mapsOnce ? [new TakeOvers(this.#o.claims)] : [],
        },
        ...(openTable && { openTable }),
        ...(makeSpeculator && { makeSpeculator }),
      },
      this.host,
      faultMayFail,
      this.#o.claims,
    );
    if (this.#o.harvestInterval < Number.POSITIVE_INFINITY) tracker.dirty.start();
    const frontEnd = createFrontEnd(this.#o.frontEnd, {
      ...{ memory, tracker, assigned, pinPage: true, hostError: () => {} },
    });
    return { memory, iommu, tracker, frontEnd };
  }
}

/** Of frames whose pages the kernel had pinned already. */
class TakeOvers implements PinObserver {
  readonly #claims: ClaimsModel;
  constructor(claims: ClaimsModel) {
    this.#claims = claims;
  }
  pinned(gfn: Gfn, _now: Nanoseconds, unasked: boolean): void {
    if (unasked) this.#claims.takenOver(gfn);
  }
  tried(): void {}
}

/** Sees from outside that a PIN request is all or nothing, and that a fault is served while there is room. */
export class CheckedTracker extends Tracker {
  readonly #host: FakeHost;
  readonly #iommu: SoftwareIommu;
  readonly #faultMayFail: () => void;
  readonly #claims: ClaimsModel;

  constructor(options: TrackerOptions, host: FakeHost, faultMayFail = () => {}, claims = new ClaimsModel()) {
    super(options);
    this.#host = host;
    this.#iommu = options.iommu;
    this.#faultMayFail = faultMayFail;
    this.#claims = claims;
  }

  override adopt(pins: Parameters<Tracker["adopt"]>[0]): void {
    super.adopt(pins);
    this.#claims.forgetAll();
  }

  override machineReset(): void {
    super.machineReset();
    this.#claims.forgetAll();
  }

  override hold(mapping: Mapping): number {
    const since = this.#claims.now;
    const status = super.hold(mapping);
    if (status === VIRTIO_IOMMU_S_OK) for (const gfn of framesOf(mapping)) this.#claims.held(gfn, since);
    return status;
  }

  override letGo(mappings: Iterable<Mapping>, kept?: boolean): void {
    const gone = [...mappings];
    super.letGo(gone, kept);
    for (const mapping of gone) for (const gfn of framesOf(mapping)) this.#claims.letGo(gfn);
  }

  override touched(gfn: Gfn, device: number): boolean {
    const { failures } = this.#host;
    const tight = this.pinned >= this.quota;
    const granted = super.touched(gfn, device);
    // Of a mapping that others use, so that it cannot go.
    const stale = this.#host.mapsOnce && this.#host.holds(gfn) && !this.#host.holdsPresent(gfn);
    const excused = tight || stale || this.#host.failures !== failures;
    if (excused) this.#faultMayFail();
    if (granted ? !this.#host.holds(gfn) : this.#iommu.isFaultCapable(device) && !excused)
      throw new Violation(
        `a fault on frame ${gfn} is ${granted ? "granted, but it is not held" : "refused"}`,
      );
    return granted;
  }

  override pin(...asked: Parameters<Tracker["pin"]>): number {
    const [ranges] = asked;
    const before = new Set([...this.#host.pages].map(({ gfn }) => gfn));
    const since = this.#claims.now;
    const { mapsOnce, pinsMax, pinsLeft } = this.#host;
    const scarce = pinsMax !== undefined && 2 * pinsLeft! <= pinsMax;
    const status = super.pin(...asked);
    if (status === VIRTIO_IOMMU_S_OK) {
      for (const { gfn, nrFrames } of ranges)
        for (let i = 0; i < nrFrames; i++) {
          this.#claims.asked(gfn + i, since);
          if (!this.#host.holds(gfn + i))
            throw new Violation(`PIN of frame ${gfn + i} is OK, but it is not held`);
        }
      this.#checkUnasked(ranges, before, scarce, mapsOnce);
    } else
      for (const { gfn } of this.#host.pages)
        if (!before.has(gfn))
          throw new Violation(`PIN was refused with ${status}, but frame ${gfn} was pinned`);
    return status;
  }

  /** What a request has brought about beside its own frames. `scarce`: mappings were; `grows`: they may take others along. */
  #checkUnasked(
    ranges: Parameters<Tracker["pin"]>[0],
    before: ReadonlySet<Gfn>,
    scarce: boolean,
    grows: boolean,
  ): void {
    const asked = (gfn: number) => ranges.some((r) => r.gfn <= gfn && gfn < r.gfn + r.nrFrames);
    const pages = [...this.#host.pages].filter(({ gfn }) => !before.has(gfn) && !asked(gfn));
    for (const { gfn, anew } of pages)
      if (anew && !scarce) throw new Violation(`frame ${gfn}, which was discarded, gets memory unasked`);
    const shown = new Set(this.frames());
    const unasked = [...new Set(pages.map(({ gfn }) => gfn))].filter((gfn) => !grows || shown.has(gfn));
    const budget = Number(this.speculation.parameters.budget ?? 0);
    if (unasked.length > budget)
      throw new Violation(`a request has pinned frames ${unasked} unasked; there may be ${budget}`);
  }
}
