import { HostError } from "../base/errors.ts";
import { FRAME_SIZE, type Gfn, type Gpa, gpaOf } from "../base/units.ts";
import type { GuestRegion } from "../memory/guest-memory.ts";
import type { UnpinPolicy } from "../policy/policy.ts";
import type { Asked, Speculation } from "../policy/speculation/speculation.ts";
import { VIRTIO_IOMMU_S_OK } from "../wire/virtio-iommu.ts";
import { OpenAccesses } from "./accesses.ts";
import { BackgroundPins, STOPPED_BY } from "./background-pins.ts";
import { countMappings, countPinned } from "./counters.ts";
import { DirtyTracking } from "./dirty.ts";
import { DmaTrackingTable } from "./dtt.ts";
import type { FaultLog } from "./faults.ts";
import { FAULTED_LATELY, type Ledger, NO_TABLE } from "./ledger.ts";
import { GuestLife, LIVES, type Life, type LifeEvent } from "./life.ts";
import { framesOf, type Mapping } from "./mapping-trees.ts";
import { Pins } from "./pins.ts";
import { Remapping } from "./remapping.ts";
import { RequestPins } from "./request-pins.ts";
import { Speculator } from "./speculator.ts";
import { StaticPins } from "./static-pins.ts";
import { TableInUse } from "./table-in-use.ts";
import type { TrackerOptions } from "./tracker-options.ts";
import { type IdleRange, type IdleSlice, UnpinPasses } from "./unpin-passes.ts";

export { TRACKING_COUNTERS, type TrackingCounters } from "./counters.ts";
export type { TrackerOptions } from "./tracker-options.ts";

/** Below 1 MiB firmware keeps what it lets devices touch. */
const FIRMWARE_WINDOW_END = 256;

/**
 * Pins on request and unpins lazily: the one place that changes what is pinned for a guest. Single-threaded: a PIN
 * request is served between slices of an unpin pass, never inside one.
 */
export class Tracker {
  /** Domains of endpoints, which pin and unpin here. */
  readonly remapping: Remapping;
  readonly faults: FaultLog;
  readonly #o: TrackerOptions;
  readonly #pins: Pins;
  readonly #ledger: Ledger;
  readonly #static: StaticPins;
  /** What devices write. Only with PIN_DIRTY it is known: else every frame that they reach counts as written. */
  readonly dirty: DirtyTracking;
  readonly #table: TableInUse;
  readonly #accesses: OpenAccesses;
  readonly #passes: UnpinPasses;
  readonly #requests: RequestPins;
  readonly #speculator: Speculator;
  readonly #background: BackgroundPins;
  readonly #life: GuestLife;
  #quota: number;
  #parks = 0;
  #parkedByOperator = false;

  constructor(options: TrackerOptions) {
    this.#o = options;
    const { beforeActivation, activationTimeout = Number.POSITIVE_INFINITY, bus } = options;
    this.#life = new GuestLife(beforeActivation, activationTimeout, bus, options.clock);
    this.#quota = options.quota;
    const room = () => this.#quota - this.pinned;
    const mayPin = (gfn: Gfn) => this.#speculator.allows(gfn);
    this.#pins = new Pins({ ...options, room, mayPin });
    this.#ledger = this.#pins.ledger;
    this.#accesses = new OpenAccesses(options.iommu);
    this.#table = new TableInUse(this.#ledger, this.#accesses, {
      used: (gfn) => this.#speculator.noticed(gfn),
      closes: () => this.#speculator.tableCloses(),
    });
    this.#static = new StaticPins(options.memory, options.pinner, options.iommu);
    this.dirty = new DirtyTracking(
      () => (this.#static.frames > 0 ? options.memory.frames() : this.#ledger.frames()),
      (gfn) => options.iommu.writesUntold || this.#table.takeDirty(gfn),
    );
    const parts = { pins: this.#pins, table: this.#table, clock: options.clock, counters: options.counters };
    const parked = () => this.parked || this.life === "static";
    const { pressure = () => 0 } = options;
    this.#passes = new UnpinPasses({ ...parts, dirty: this.dirty, parked, pressure });
    this.#background = new BackgroundPins(options.memory, this.#pins, options.clock, () => this.#quota);
    const { makeSpeculator = (o) => new Speculator(o), speculationStopped: stopped = () => {} } = options;
    this.#speculator = makeSpeculator({ ...parts, memory: options.memory, room, parked, stopped });
    this.#pins.observe(this.#speculator);
    if (options.speculation) this.#speculator.choose(options.speculation);
    this.#requests = new RequestPins({
      ...{ ...parts, memory: options.memory, dirty: this.dirty, speculator: this.#speculator, room },
      unpinAll: () => this.#unpinAll(),
      refused: options.refused ?? (() => {}),
    });
    this.remapping = new Remapping(options.iommu, this);
    this.faults = options.iommu.faultLog(options.counters);
    options.counters.startedAt = options.counters.changedAt = options.clock.now();
    options.iommu.setGranting(this.#granting);
    this.#show();
  }

  get life(): Life {
    return this.#life.now;
  }
  get quota(): number {
    return this.#quota;
  }
  /** Frames pinned now, statically or on request. */
  get pinned(): number {
    return this.#pins.size + this.#static.frames;
  }
  /** The ledger's frames: those pinned one by one. */
  frames(): Iterable<Gfn> {
    return this.#ledger.frames();
  }
  get parked(): boolean {
    return this.parkedByGuest || this.#parkedByOperator;
  }
  get parkedByGuest(): boolean {
    return this.#parks > 0;
  }
  get active(): boolean {
    return this.#table.active;
  }
  get policy(): UnpinPolicy {
    return this.#pins.policy;
  }
  get speculation(): Speculation {
    return this.#speculator.speculation;
  }

  // --- the guest's life ------------------------------------------------------------------------------------------

  /**
   * The VMM's view of guest RAM has changed. Pins of frames that are no longer backed by the same memory go; what the
   * state wants pinned without a request is pinned. Throws HostError when that fails; the memory is known all the same.
   */
  setMemory(regions: readonly GuestRegion[]): void {
    const lost = this.#o.memory.backedOtherwise(regions, this.#ledger.frames());
    this.remapping.forget(lost);
    this.#drop(lost.filter((gfn) => this.#ledger.has(gfn)));
    this.#o.memory.setRegions(regions);
    this.dirty.memoryChanged(this.#o.memory);
    this.#pins.releaseOrphans();
    this.#background.restart();
    this.#pinUnasked();
  }

  /**
   * Take over what an earlier backend had pinned: its end must not end the pins, because devices may be using them.
   * Called once, after setMemory(); the state is as after PIN off, until a driver turns PIN on again.
   */
  adopt(pins: Iterable<readonly [gfn: Gfn, handle: number]>): void {
    this.#pins.adopt(pins);
    this.#life.adopted();
    this.#o.iommu.setGranting(this.#granting);
    this.#show();
    this.#changed();
  }

  /** PIN on; `marksDirty`: with PIN_DIRTY. False when the table is not valid. */
  activate(root: number, levels: number, complete: boolean, marksDirty = false): boolean {
    const { memory, openTable = (m, r, l) => new DmaTrackingTable(m, r, l) } = this.#o;
    if (!DmaTrackingTable.valid(memory, root, levels)) return false;
    this.#table.open(openTable(memory, root as Gpa, levels), complete, marksDirty);
    this.#enter(complete ? "pin-on" : "pin-on-incomplete");
    return true;
  }

  /** PIN off, or reset of the virtio-iommu device. What is pinned stays: assigned devices may still write to it. */
  deactivate(event: "pin-off" | "device-reset"): void {
    this.#table.close();
    this.#passes.stop();
    this.#enter(event);
    this.#look();
  }

  machineReset(): void {
    this.#table.close();
    this.#passes.stop();
    this.#enter("machine-reset");
    this.#speculator.restart();
    this.remapping.reset(this.#inBackground);
    if (this.#inBackground) this.#ledger.disown();
    else this.#drop([...this.#ledger.frames()]);
    this.#pinUnasked();
  }

  /** When live() has something to do; Infinity for never. */
  get dueAt(): number {
    const { lookAt } = this.#life;
    return this.#inBackground ? Math.min(lookAt, this.#background.dueAt) : lookAt;
  }

  /**
   * What is due without any word of the driver: a change of state, or one slice of pinning everything. Throws
   * HostError; what it refused is asked for again later.
   */
  live(): void {
    this.#look();
    if (!this.#inBackground || this.#o.clock.now() < this.#background.dueAt) return;
    try {
      this.#o.counters.framesPinned += this.#background.slice();
    } finally {
      this.#changed();
    }
  }

  #look(): void {
    const event = this.#life.look();
    if (!event) return;
    this.#enter(event);
    if (event !== "functions-reset") return;
    if (this.#inBackground) {
      this.#ledger.disown();
      this.#changed();
      return;
    }
    // What domains map stays theirs: the driver has not reset our device.
    this.#drop([...this.#ledger.frames()].filter((gfn) => !this.#ledger.isNeeded(gfn)));
    try {
      this.#pinUnasked();
    } catch (error) {
      // What is left out is pinned when a device touches it.
      if (!(error instanceof HostError)) throw error;
    }
  }

  park(): void {
    this.#parks++;
    this.#show();
  }

  unpark(): void {
    this.#parks = Math.max(0, this.#parks - 1);
    this.#show();
  }

  /**
   * A device touched `gfn`, which was not pinned. True: it is now. A fault-capable device has that right at any time, and
   * touches again what was unpinned; any other has it only while the guest is undecided. Within the quota, because a
   * guest could make its devices touch all of its memory.
   */
  touched(gfn: Gfn, device: number): boolean {
    const { memory, iommu, wholeRam, counters } = this.#o;
    const faultCapable = iommu.isFaultCapable(device);
    if (!(faultCapable || this.#granting) || wholeRam) return false;
    if (!memory.find(gpaOf(gfn), FRAME_SIZE)) return false;
    if (!this.#ledger.has(gfn)) {
      const status = this.#requests.touch(gfn, faultCapable ? FAULTED_LATELY : NO_TABLE);
      this.#changed();
      if (status !== VIRTIO_IOMMU_S_OK) return false;
      counters[faultCapable ? "framesFaulted" : "framesFirmware"]++;
    }
    if (faultCapable) this.#accesses.granted(gfn, device);
    return true;
  }

  // --- the operator's word ---------------------------------------------------------------------------------------

  /** A pass that is under way ends. The new policy is told of what is pinned, in slices, when the next pass begins. */
  setPolicy(policy: UnpinPolicy): void {
    this.#pins.setPolicy(policy);
    this.#passes.stop();
  }

  /** What others have pinned unasked goes with the passes. One that had switched itself off is on again. */
  setSpeculation(speculation: Speculation): void {
    this.#speculator.choose(speculation);
  }

  /** Below what is pinned, it refuses new pins until that has fallen; nothing is torn out. */
  setQuota(frames: number): void {
    this.#quota = frames;
    this.#background.restart();
    this.#show();
  }

  /** Beside the guest's parks, and through resets. */
  parkByOperator(parked: boolean): void {
    this.#parkedByOperator = parked;
    this.#show();
  }

  /**
   * Force-unpin, abi.md section 4: one slice of an unpin of what is idle in a range, lately accessed or not. Throws
   * HostError when it cannot be found out what was discarded.
   */
  unpinIdle(range: IdleRange): IdleSlice {
    if (range.from === 0) this.#beforePass();
    if (!range.discarded) this.#speculator.forbid(range.first, range.end);
    const outcome = this.#passes.idle(range);
    this.#changed();
    return outcome;
  }

  // --- PIN request -----------------------------------------------------------------------------------------------

  /**
   * Serve a PIN request: all frames pinned and their P set, or nothing newly pinned. Returns the status that
   * docs/abi.md section 3 names. The frames asked for are at most those the guest has: bounds the loops.
   */
  pin(ranges: Asked["ranges"], endpoint = 0): number {
    const status = this.#requests.serve({ ranges, endpoint });
    const { counters } = this.#o;
    counters.pinRequests++;
    if (status !== VIRTIO_IOMMU_S_OK) counters.pinRequestsRefused++;
    this.#changed();
    return status;
  }

  // --- domains ---------------------------------------------------------------------------------------------------

  /**
   * A domain maps frames: all of them are pinned until letGo(), or none newly. The status says why not. They get no P,
   * because no table asked.
   */
  hold(mapping: Mapping): number {
    const status = this.#requests.hold(mapping, this.#o.wholeRam === true);
    this.#changed();
    return status;
  }

  /** Domains no longer map what hold() was called for. `kept`: until a table is there that says what is in use. */
  letGo(mappings: Iterable<Mapping>, kept = false): void {
    if (this.#o.wholeRam) return;
    const gone = [...mappings];
    // No unit tells what devices wrote through a domain.
    if (this.dirty.on)
      for (const mapping of gone) for (const gfn of framesOf(mapping)) this.dirty.remember(gfn);
    this.#o.counters.framesUnpinned += this.#pins.giveUp(gone, kept || this.life === "static");
    this.#changed();
  }

  // --- unpin -----------------------------------------------------------------------------------------------------

  /** Begin an unpin pass, unless one is under way or there is nothing that may be unpinned. */
  startPass(): void {
    this.#beforePass();
    this.#changed();
    this.#passes.start();
  }

  /** One slice of the pass. True while there is more. */
  slice(): boolean {
    const more = this.#passes.slice();
    this.#changed();
    return more;
  }

  #beforePass(): void {
    this.sampleKernel();
    this.#pins.releaseOrphans();
  }

  /** Unpin now all that may be: for a request that would not fit. True if anything was unpinned. */
  #unpinAll(): boolean {
    const before = this.#pins.size;
    this.#beforePass();
    this.#passes.runAll();
    return this.#pins.size < before;
  }

  // --- pins without a table --------------------------------------------------------------------------------------

  /** Devices may ask for what they touch: all of it is to be pinned, or none of it was foreseen. */
  get #granting(): boolean {
    return this.#inBackground || (this.life === "undecided" && this.#o.beforeActivation === "bios");
  }

  get #inBackground(): boolean {
    return this.life === "static" && !this.#o.wholeRam;
  }

  /** Throws HostError. */
  #pinFirmwareWindow(): void {
    const window = [...this.#o.memory.frames(FIRMWARE_WINDOW_END)];
    const missing = window.filter((gfn) => !this.#ledger.has(gfn));
    // What is left out for the quota's sake is pinned when a device touches it.
    this.#pinFirmware(missing.slice(0, Math.max(0, this.#quota - this.pinned)));
  }

  #pinFirmware(gfns: readonly Gfn[]): void {
    this.#pins.pin(gfns, NO_TABLE);
    this.#o.counters.framesPinned += gfns.length;
    this.#o.counters.framesFirmware += gfns.length;
  }

  /** Pin what the state wants pinned without a request. Throws HostError. */
  #pinUnasked(): void {
    try {
      if (this.#o.wholeRam) this.#o.counters.framesPinned += this.#static.cover();
      else if (this.life === "undecided" && this.#granting) this.#pinFirmwareWindow();
    } finally {
      this.#changed();
    }
  }

  /** Let go of frames whatever their units say; a table that is in use loses their P, so that the guest asks again. */
  #drop(gfns: readonly Gfn[]): void {
    for (const gfn of gfns) {
      this.#table.clearPinned(gfn);
      this.dirty.remember(gfn);
    }
    this.#pins.drop(gfns);
    this.#o.counters.framesUnpinned += gfns.length;
  }

  // --- accounts --------------------------------------------------------------------------------------------------

  /** Compare what the kernel says is pinned. Called before passes, because there pins fall most. */
  sampleKernel(): void {
    const pages = this.#o.pinner.kernelPinnedPages();
    if (pages !== null) this.#o.counters.kernelPagesPeak = Math.max(this.#o.counters.kernelPagesPeak, pages);
  }

  #enter(event: LifeEvent): void {
    this.#life.enter(event);
    this.#parks = 0;
    this.#background.restart();
    this.#show();
    this.#changed();
    this.#o.iommu.setGranting(this.#granting);
  }

  /** To observers. */
  #show(): void {
    Object.assign(this.#o.counters, {
      life: LIVES.indexOf(this.life),
      parks: this.#parks,
      parkedByOperator: Number(this.#parkedByOperator),
      quota: this.#quota,
    });
  }

  #changed(): void {
    const { counters, clock, pinner } = this.#o;
    countPinned(counters, this.pinned, clock.now());
    if (pinner.mapsOnce) countMappings(counters, pinner, this.#pins.beyondNeed);
    counters.framesClaimed = this.#ledger.claimed;
    counters.backgroundFrames = this.#inBackground ? this.#background.frames : 0;
    counters.backgroundPinned = this.#inBackground ? this.#ledger.size : 0;
    counters.backgroundStopped = this.#inBackground ? STOPPED_BY.indexOf(this.#background.stopped) : 0;
  }
}
