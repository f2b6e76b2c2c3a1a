import { type Random, random } from "../base/random.ts";
import { type Bdf, FRAME_SIZE, type Gfn, type Gpa, milliseconds } from "../base/units.ts";
import type { DriverCounters } from "../driver/counters.ts";
import { DRIVERS } from "../driver/front-end.ts";
import type { RemappedDma, RemappedDmaOptions } from "../driver/remapped-dma.ts";
import type { DriverCpu } from "../driver/viommu.ts";
import { counters, countersBuffer } from "../memory/counters.ts";
import { GuestMemory, type GuestRegion } from "../memory/guest-memory.ts";
import { createPolicy } from "../policy/registry.ts";
import { createSpeculation } from "../policy/speculation/registry.ts";
import { countUnused, createIommuBuffer, DeviceGate, isIdleIommuWord } from "../tracking/software-iommu.ts";
import { TRACKING_COUNTERS, type Tracker } from "../tracking/tracker.ts";
import { Backend, type BackendOptions, type BackendParts } from "./backend.ts";
import { Balloon } from "./balloon.ts";
import { Bus } from "./bus.ts";
import { Checks } from "./checks.ts";
import { ClaimsModel } from "./claims-model.ts";
import { DmaEngine, type MakeGate } from "./dma-engine.ts";
import { DriverArrival } from "./driver-arrival.ts";
import { type FakeHost, HOST_BASE, PRESENT } from "./fake-host.ts";
import { FaultChecks } from "./fault-checks.ts";
import { Guest } from "./guest.ts";
import { GuestCpu } from "./guest-cpu.ts";
import { RemappedDevice } from "./remapped-device.ts";
import { Saboteur } from "./saboteur.ts";
import { POLICIES, type Settings, SPECULATIONS, settingsOf } from "./settings.ts";
import type { WorldStatistics } from "./statistics.ts";
import { kindOf } from "./stray-dma.ts";
import { Violation } from "./turn.ts";
import { type Schedule, Turns } from "./turns.ts";

/** Parts that a broken twin replaces. */
export interface Twin {
  readonly backend?: Partial<BackendOptions & BackendParts>;
  readonly driver?: Partial<DriverCpu>;
  readonly makeGate?: MakeGate;
  readonly remappedDma?: (options: RemappedDmaOptions) => RemappedDma;
}

/** RAM in two pieces: one reaches into firmware's window below 1 MiB, one across the end of a leaf of the table. */
const LOW = { first: 252, frames: 44 };
const HIGH = { first: 1008, frames: 40 };
/** Buffers lie across the end of a leaf. */
const BUFFERS_FIRST = 1022;
/** Frames for the driver: its table and queue, and what each CPU allocates. */
const BOOT_POOL = { first: 256, frames: 24 };
const CPU_POOL = 4;
export const ENDPOINT = 0x20 as Bdf;
const endpointOf = (device: number): Bdf => (ENDPOINT + 8 * device) as Bdf;
/** The time that a step takes, in ns. */
const STEP_TIME = 2000;
/** Turns without a step: looks of those who wait, and passes that find nothing to try. */
const IDLE_TURNS_MAX = 10_000;
/** Steps that a world may take to come to rest. */
const REST_STEPS_MAX = 400_000;
/** Unpin passes until everything idle must be gone: one clears A, one unpins, and one may have been under way. */
const REST_PASSES = 3;
/** Harvests until everything that was written must have been given: one may have been under way. */
const REST_HARVESTS = 2;

const ram = ({ first, frames }: { first: number; frames: number }): GuestRegion => ({
  gpa: (first * FRAME_SIZE) as Gpa,
  size: frames * FRAME_SIZE,
  hostAddress: HOST_BASE + first * FRAME_SIZE,
  presentAddress: PRESENT + HOST_BASE + first * FRAME_SIZE,
  bytes: new Uint8Array(new SharedArrayBuffer(frames * FRAME_SIZE)),
});

/**
 * A whole machine in one thread: guest CPUs that run the production driver, devices behind the production gate, the
 * production backend, and a host kernel that fails as it is told. Who takes the next step is the schedule's choice.
 */
export class World {
  readonly settings: Settings;
  readonly turns: Turns;
  readonly host: FakeHost;
  readonly checks: Checks;
  readonly #faults: FaultChecks;
  readonly #random: Random;
  readonly #memory: GuestMemory;
  readonly #iommu: SharedArrayBuffer;
  readonly #gate: DeviceGate;
  readonly #bus = new Bus();
  readonly #claims = new ClaimsModel();
  readonly #guest: Guest;
  readonly #cpus: GuestCpu[];
  readonly #engines: DmaEngine[];
  readonly #backend: Backend;
  readonly #balloon: Balloon;
  readonly #stepsMax: number;
  readonly #counters = counters(TRACKING_COUNTERS, countersBuffer(TRACKING_COUNTERS));
  #quota: number;
  #restSteps = 0;
  #passesAtRest = -1;
  #harvestsAtRest = -1;
  #kicksLost = 0;
  #backendDeaths = 0;
  #machineResets = 0;
  #operatorOrders = 0;
  readonly #arrival: DriverArrival;

  /** After `stepsMax` steps the guest unmaps what it has, the host stops failing, and all comes to rest. */
  constructor(seed: number, stepsMax: number, settings = settingsOf(seed), twin: Twin = {}) {
    this.settings = settings;
    this.#quota = settings.quota;
    this.#stepsMax = stepsMax;
    this.#random = random(seed);
    this.turns = new Turns({
      schedule: weighted(random(seed ^ 0x0bad_5eed)),
      stepTime: STEP_TIME,
      beforeStep: () => this.#beforeStep(),
    });
    const regions = [ram(LOW), ram(HIGH)];
    this.#memory = new GuestMemory(regions);
    this.#iommu = createIommuBuffer(2048);
    this.#gate = new DeviceGate(this.#iommu, 7, () => {});
    this.#backend = this.#makeBackend(twin.backend ?? {});
    this.host = this.#backend.host;
    this.#balloon = new Balloon(this.host, (order) => this.#backend.order(order));
    this.checks = new Checks({
      host: this.host,
      isRam: (gfn) => this.#memory.find(gfn * FRAME_SIZE, FRAME_SIZE) !== undefined,
      quota: () => this.#quota,
      hostile: settings.hostile,
      claims: this.#claims,
    });
    const { turns, checks } = this;
    this.#faults = this.#faultChecks();
    this.#engines = Array.from(
      { length: this.#devices },
      (_, id) =>
        new DmaEngine({
          id,
          turns,
          checks,
          regions,
          iommu: this.#iommu,
          idleWord: this.#idleWord,
          ring: () => this.#backend.ring(),
          faults: (engine, address, job) =>
            this.#faults.met({ device: id, address, ...kindOf(this.#guest, engine, job) }),
          ...(twin.makeGate && { makeGate: twin.makeGate }),
        }),
    );
    this.#guest = this.#makeGuest();
    this.#cpus = Array.from({ length: settings.cpus }, (_, id) => {
      const first = BOOT_POOL.first + BOOT_POOL.frames + (id - 1) * CPU_POOL;
      const pool = id === 0 ? BOOT_POOL : { first, frames: CPU_POOL };
      return new GuestCpu(this.#guest, id, pool, random(seed + 77 * id), twin);
    });
    this.turns.actors.push(this.#backend, ...this.#cpus.map((c) => c.process));
    this.turns.actors.push(...this.#engines.map((e) => e.process));
    if (settings.hostile)
      this.turns.actors.push(new Saboteur(this.#guest, regions, turns, random(seed ^ 0x1ee7)).process);
    const parts = { settings, turns, checks, counters: this.#counters, regions };
    this.#arrival = new DriverArrival(parts);
    if (settings.beforeActivation !== "none") this.#runFirmware();
  }

  /** Play until everything is at rest. Throws Violation for what a checker found. */
  run(): void {
    for (let idle = 0, last = -1; !this.#finished(); idle++) {
      const actor = this.turns.pick();
      if (!actor || idle > IDLE_TURNS_MAX)
        throw new Violation("nobody can go on: somebody waits for an answer that never comes");
      actor.resume();
      if (last !== this.turns.steps) idle = 0;
      last = this.turns.steps;
    }
  }

  get statistics(): WorldStatistics {
    const sum = (name: keyof DriverCounters) => this.#cpus.reduce((n, { counters: c }) => n + c[name], 0);
    return {
      steps: this.turns.steps,
      maps: sum("map"),
      mapsFailed: sum("mapFailed"),
      pinRequests: sum("pinRequests"),
      framesPinned: this.#counters.framesPinned,
      framesUnpinned: this.#counters.framesUnpinned,
      transfers: this.#engines.reduce((n, e) => n + e.transfers, 0),
      kicksLost: this.#kicksLost,
      driverRestarts: this.#guest.driverRestarts,
      backendDeaths: this.#backendDeaths,
      machineResets: this.#machineResets,
      operatorOrders: this.#operatorOrders,
      harvests: this.#backend.harvests,
      moves: this.#guest.parts.remapped?.moves ?? 0,
      mapRequests: sum("mapRequests"),
      unmapRequests: sum("unmapRequests"),
      allPinned: this.#arrival.timesPinned,
      balloonReturns: this.#balloon.returns,
      framesFaulted: this.#counters.framesFaulted,
      faultsReported: this.#counters.faultsReported,
      faultsDropped: this.#counters.faultsDropped,
      framesNeverTransferred: this.#claims.unusedPeak,
      framesSpeculative: this.#counters.framesSpeculative,
      speculationSaved: this.#counters.speculationSaved,
      speculationWasted: this.#counters.speculationWasted,
      framesBeyondNeed: this.#counters.framesBeyondNeedPeak,
      mappingsExhausted: this.host.exhausted,
    };
  }

  #makeGuest(): Guest {
    const { settings, turns, checks } = this;
    return new Guest({
      ...{
        memory: this.#memory,
        turns,
        bus: this.#bus,
        checks,
        faults: this.#faults,
        frontEnd: DRIVERS[settings.frontEnd],
        endpoint: ENDPOINT,
        remapped: settings.remapping === "none" ? undefined : this.#remappedDevice(),
        engines: this.#engines,
        ...(settings.faultCapable && { faultCapable: this.#engines.at(-1)! }),
      },
      ...{
        buffers: { first: BUFFERS_FIRST, frames: settings.buffers },
        cpus: settings.cpus,
        balloon: settings.balloon ? this.#balloon : undefined,
        hostile: settings.hostile,
        strays: settings.strays,
        pinDirty: settings.pinDirty,
        restarts: settings.driverRestarts,
        hoards: (cpu) => settings.selfish && cpu === settings.cpus - 1,
        mayBoot: () => this.#arrival.mayBoot(this.#guest),
        allPinned: () => this.#arrival.allPinned(),
      },
    });
  }

  #faultChecks(): FaultChecks {
    return new FaultChecks({
      counters: this.#counters,
      endpoint: endpointOf,
      queue: () => this.#guest.eventQueue(this.#backendDeaths + this.#machineResets),
      hostile: this.settings.hostile,
    });
  }

  #remappedDevice(): RemappedDevice {
    const gate = new DeviceGate(this.#iommu, 1, () => {});
    return new RemappedDevice({
      endpoint: endpointOf(1),
      engine: this.#engines[1]!,
      lazy: this.settings.remapping === "lazy",
      hostile: this.settings.hostile,
      reaches: (page) => (["read", "write"] as const).some((access) => gate.allows(page, access)),
    });
  }

  /** A hostile guest's garbage may be a request for a domain. */
  readonly #idleWord = (index: number): boolean =>
    !(this.settings.hostile || this.settings.remapping !== "none") && isIdleIommuWord(index, this.#devices);

  get #devices(): number {
    return this.settings.devices + Number(this.settings.faultCapable);
  }

  #makeBackend(twin: NonNullable<Twin["backend"]>): Backend {
    const { settings } = this;
    const oneIn = (n: number): boolean => n > 0 && !this.#guest.draining && this.#random(n) === 0;
    return new Backend({
      turns: this.turns,
      memory: this.#memory,
      iommu: this.#iommu,
      bus: this.#bus,
      frontEnd: settings.frontEnd,
      policy: () => createPolicy(settings.policy),
      pressure: () => this.#random(2),
      speculation: () => createSpeculation(settings.speculate),
      quota: () => this.#quota,
      beforeActivation: settings.beforeActivation,
      activationTimeout: milliseconds(settings.activationTimeout),
      assignedBus: {
        mastering: () => settings.activationTimeout < Number.POSITIVE_INFINITY,
        quiet: () => false,
      },
      assigned: new Map(Array.from({ length: this.#devices }, (_, id) => [endpointOf(id), id])),
      faultCapable: settings.faultCapable ? [settings.devices] : [],
      faultMayFail: () => this.checks.faultMayFail(),
      claims: this.#claims,
      mappings: settings.mappings,
      passInterval: milliseconds(settings.interval),
      harvestInterval: milliseconds(settings.harvestInterval),
      harvestSlice: settings.harvestSlice,
      counters: this.#counters,
      faults: {
        pin: () => (oneIn(settings.pinFails) ? (this.#random(2) ? "ENOMEM" : "EIO") : undefined),
        release: () => !oneIn(settings.releaseFails),
      },
      observer: {
        pinned: (...args) => this.checks.pinned(...args),
        released: (gfn) => this.checks.released(gfn),
      },
      kickLost: () => {
        const lost = oneIn(settings.kickLost);
        if (lost) this.#kicksLost++;
        return lost;
      },
      constant: (gpa) => !settings.hostile && this.#guest.isUpperLevel(gpa),
      idleWord: this.#idleWord,
      dies: () => oneIn(settings.backendDies),
      died: () => {
        this.#backendDeaths++;
        this.#balloon.backendDied();
        this.#guest.needsRestart = true;
        this.#guest.deviceLost.begin();
        this.#faults.backendDied();
        this.checks.copiedAll();
      },
      reportFaults: (report) => this.#faults.serving(report),
      harvestBegins: () => this.checks.harvestBegins(),
      harvested: (slice) => this.checks.harvested(slice),
      between: () => this.#betweenJobs(),
      ...twin,
    });
  }

  /** Before a driver is active, devices may touch what they like: the host pins it then and there, or refuses. */
  #runFirmware(): void {
    const guest = this.#guest;
    for (let i = 0; i < 6; i++) {
      const iova = (BUFFERS_FIRST + this.#random(this.settings.buffers)) * FRAME_SIZE;
      this.#engines[0]!.queue({
        segments: [{ iova: iova as never, length: 512 }],
        // Later than this it breaks what a driver promises with COMPLETE: nobody tells of its writes.
        get writes() {
          return guest.places === undefined;
        },
        mayFault: () => !guest.parts.allPinned(),
        done: () => {},
      });
    }
  }

  #beforeStep(): void {
    if (this.turns.steps === this.#stepsMax) {
      this.#guest.draining = true;
      this.#withdrawOrders();
    }
    if (this.#guest.draining && this.#restSteps++ > REST_STEPS_MAX)
      throw new Violation(`the machine does not come to rest within ${REST_STEPS_MAX} steps`);
  }

  /** The backend has finished a piece of work. */
  #betweenJobs(): void {
    const { tracker } = this.#backend;
    this.checks.accounts(tracker.frames(), tracker.pinned, this.#memory.regions, (gfn) =>
      this.#gate.allows(gfn as Gfn),
    );
    // Where a hostile guest's domains lead to, nobody knows beforehand.
    if (!this.settings.hostile || this.settings.remapping === "none")
      this.#claims.check(tracker.frames(), this.#counters.framesClaimed, countUnused(this.#iommu));
    this.#arrival.check();
    if (this.#guest.draining) return;
    this.#balloon.between(this.#backend.passes);
    const { machineResets, operator } = this.settings;
    if (machineResets > 0 && this.#random(machineResets) === 0) this.#resetMachine();
    if (operator > 0 && this.#random(operator) === 0) this.#order();
  }

  /** An operator changes something. */
  #order(): void {
    this.#operatorOrders++;
    const quota = this.#random(3) === 0 ? Number.POSITIVE_INFINITY : 4 + this.#random(12);
    const policy = createPolicy(POLICIES[this.#random(POLICIES.length)]!);
    const speculation = createSpeculation(SPECULATIONS[this.#random(SPECULATIONS.length)]!);
    const parked = this.#random(3) === 0;
    const orders: ((tracker: Tracker) => void)[] = [
      (tracker) => tracker.setPolicy(policy),
      (tracker) => tracker.setSpeculation(speculation),
      (tracker) => {
        this.#quota = quota;
        tracker.setQuota(quota);
      },
      (tracker) => tracker.parkByOperator(parked),
      (tracker) => tracker.unpinIdle({ first: 0, end: Number.POSITIVE_INFINITY, from: 0 }),
    ];
    this.#backend.order(orders[this.#random(orders.length)]!);
  }

  /** So that all can come to rest. */
  #withdrawOrders(): void {
    this.#backend.order((tracker) => {
      this.#quota = this.settings.quota;
      tracker.setQuota(this.#quota);
      tracker.parkByOperator(false);
      tracker.setPolicy(createPolicy("lru"));
    });
  }

  /** Devices finish the access under way, as real ones do; everything else begins anew. */
  #resetMachine(): void {
    if (this.#engines.some((e) => e.process.busy)) return;
    this.#machineResets++;
    for (const engine of this.#engines) engine.reset();
    for (const cpu of this.#cpus) cpu.reset();
    this.#guest.parts.remapped?.reset();
    this.#guest.places = undefined;
    this.#guest.settled(false);
    this.#bus.pending.length = 0;
    for (const { bytes } of this.#memory.regions) bytes.fill(0);
    this.checks.forgetMappings();
    this.#faults.forget();
    this.#balloon.reset();
    this.#backend.resetMachine();
    this.#arrival.powerOn();
  }

  #finished(): boolean {
    if (!this.#guest.draining) return false;
    // A hostile guest may have hung itself; the host has been checked to the last step.
    if (this.settings.hostile) return true;
    if (!this.#cpus.every((c) => c.atRest) || !this.#engines.every((e) => e.atRest)) return false;
    if (this.#guest.needsRestart) return false;
    const { passes, harvests } = this.#backend;
    if (this.#passesAtRest < 0) {
      this.#passesAtRest = passes;
      this.#harvestsAtRest = harvests;
    }
    if (passes < this.#passesAtRest + REST_PASSES) return false;
    if (
      this.settings.harvestInterval < Number.POSITIVE_INFINITY &&
      harvests < this.#harvestsAtRest + REST_HARVESTS
    )
      return false;
    this.checks.atRest();
    this.#faults.atRest();
    return true;
  }
}

/** Whoever took the last step goes on half of the time: switching costs, and runs of steps find bugs too. */
function weighted(next: Random): Schedule {
  return {
    choose: (width, current) => (current >= 0 && next(2) === 0 ? current : next(width)),
    holdsBack: () => next(5) === 0,
  };
}
