import { InvariantViolation } from "../base/errors.ts";
import { type Bdf, FRAME_SIZE, type Gfn, type Gpa, type Iova, type Nanoseconds } from "../base/units.ts";
import { DRIVER_COUNTERS } from "../driver/counters.ts";
import { DirectDma, TrackedDma } from "../driver/dma.ts";
import { DmaMapFailed } from "../driver/dma-api.ts";
import type { PinRequests } from "../driver/pin-requests.ts";
import { TrackingUnits } from "../driver/units.ts";
import { counters, countersBuffer } from "../memory/counters.ts";
import { GatedMemory } from "../memory/gated-memory.ts";
import { GuestMemory, type GuestRegion } from "../memory/guest-memory.ts";
import { createPolicy } from "../policy/registry.ts";
import { createSpeculation } from "../policy/speculation/registry.ts";
import { createIommuBuffer, DeviceGate, isIdleIommuWord, SoftwareIommu } from "../tracking/software-iommu.ts";
import { TRACKING_COUNTERS, type Tracker } from "../tracking/tracker.ts";
import { TU_COUNT, TU_PINNED, unitOffset } from "../wire/dtt.ts";
import { VIRTIO_IOMMU_S_OK } from "../wire/virtio-iommu.ts";
import { type BackendParts, CheckedTracker } from "./backend.ts";
import { Checks } from "./checks.ts";
import { ClaimsModel } from "./claims-model.ts";
import { FakeHost, HOST_BASE, PRESENT } from "./fake-host.ts";
import { HostTurn } from "./host-turn.ts";
import { type Operation, Process } from "./process.ts";
import { SteppedMemory, SteppedWords } from "./stepped-memory.ts";
import { step, type Turn, Violation } from "./turn.ts";
import { type Actor, Turns } from "./turns.ts";
import type { Twin } from "./world.ts";

/** A machine small enough to play every schedule of it. */
export interface SmallWorld {
  /** Words of the units of frames 0, 1, … at the start; those with P are pinned. */
  readonly units: readonly number[];
  /** They are one pin of the host's. */
  readonly extent?: boolean;
  /** CPUs: the frames that each maps, moves data in, and unmaps, one after the other. */
  readonly cpus: readonly (readonly number[])[];
  /** Unpin passes. */
  readonly passes: number;
  /** Force-unpins of all frames. */
  readonly forced?: number;
  /** Harvests of dirty frames, with PIN_DIRTY; one more follows when all is done. */
  readonly harvests?: number;
  readonly quota?: number;
  /** What is pinned unasked, as `--speculate` takes it. */
  readonly speculate?: string;
  /** Whether each release may be refused by the host, and each pin. */
  readonly releasesFail?: boolean;
  readonly pinsFail?: boolean;
}

export interface Exploration {
  /** Distinct states that were met at a choice, and paths through them. */
  readonly states: number;
  readonly paths: number;
  /** Paths in which a frame was unpinned, a CPU asked, a mapping failed. */
  readonly unpins: number;
  readonly asks: number;
  readonly refusals: number;
  /** The first violation, and who took the steps that led to it. */
  readonly failure: { readonly message: string; readonly steps: readonly string[] } | undefined;
}

const TABLE = { first: 8, frames: 1 };
const FRAMES = 16;
const unitOf = (gfn: number): number => TABLE.first * FRAME_SIZE + unitOffset(gfn);
const ENDPOINT = 0x20 as Bdf;
/** Between two looks at the clock: the second look at an open DMA window is the last. */
const CLOCK_STEP = 1.5e6;

/** Leaves a path whose rest has been played already. */
class Known extends Violation {}
const KNOWN = new Known();

const newTracker: BackendParts["makeTracker"] = (...args) => new CheckedTracker(...args);
const newIommu: NonNullable<BackendParts["makeIommu"]> = (...args) => new SoftwareIommu(...args);

/** Depth first through all sequences of choices, but no state twice. */
class AllSchedules {
  readonly #trail: { choice: number; readonly width: number }[] = [];
  readonly #seen = new Set<string>();
  #depth = 0;

  get states(): number {
    return this.#seen.size;
  }

  /** `state`: all that the future depends on. */
  choose(width: number, state: () => string): number {
    const at = this.#depth++;
    const known = this.#trail[at];
    if (known) {
      if (known.width !== width) throw new InvariantViolation("a schedule is not repeatable");
      return known.choice;
    }
    const key = state();
    if (this.#seen.has(key)) throw KNOWN;
    this.#seen.add(key);
    this.#trail.push({ choice: 0, width });
    return 0;
  }

  /** Go on to the next schedule. False when all have been. */
  advance(): boolean {
    this.#depth = 0;
    for (let last = this.#trail.at(-1); last; last = this.#trail.at(-1)) {
      if (++last.choice < last.width) return true;
      this.#trail.pop();
    }
    return false;
  }
}

/** Play every schedule of the production driver, gate and tracker in a small machine. */
export function explore(world: SmallWorld, twin: Twin = {}): Exploration {
  const schedules = new AllSchedules();
  const seen = { paths: 0, unpins: 0, asks: 0, refusals: 0 };
  let failure: Exploration["failure"];
  do {
    const machine = new SmallMachine(world, twin, schedules);
    try {
      machine.play();
      seen.paths++;
      if (machine.unpinned) seen.unpins++;
      if (machine.asked) seen.asks++;
      if (machine.refused) seen.refusals++;
    } catch (error) {
      if (error === KNOWN) continue;
      if (!(error instanceof Violation)) throw error;
      failure = { message: error.message, steps: machine.trace };
    }
  } while (!failure && schedules.advance());
  return { ...seen, states: schedules.states, failure };
}

/** A PIN request, as the backend gets it. */
interface Ask {
  readonly ranges: readonly { gfn: number; nrFrames: number }[];
  status: number | undefined;
}

class SmallMachine {
  readonly #turns: Turns;
  readonly #memory: GuestMemory;
  readonly #words: SharedArrayBuffer;
  readonly #host: FakeHost;
  readonly #checks: Checks;
  readonly #tracker: Tracker;
  readonly #backend: SmallBackend;
  readonly #cpus: Process[];
  readonly #asks: Ask[] = [];
  readonly #counters = counters(TRACKING_COUNTERS, countersBuffer(TRACKING_COUNTERS));
  readonly trace: string[] = [];
  asked = false;
  refused = false;

  constructor(world: SmallWorld, twin: Twin, schedules: AllSchedules) {
    const bytes = new Uint8Array(FRAMES * FRAME_SIZE);
    const hostAddress = HOST_BASE;
    const regions: GuestRegion[] = [
      { gpa: 0 as Gpa, size: bytes.length, hostAddress, presentAddress: PRESENT + hostAddress, bytes },
    ];
    this.#memory = new GuestMemory(regions);
    this.#words = createIommuBuffer(FRAMES);
    const schedule = {
      choose: (width: number) => schedules.choose(width, () => this.#state()),
      holdsBack: () => false,
    };
    this.#turns = new Turns({
      schedule,
      stepTime: 0,
      beforeStep: () => this.trace.push(this.#turns.current?.name ?? ""),
    });
    this.#backend = new SmallBackend(this.#turns, world, this.#asks, () => this.#checks);
    const refuses = (may: boolean | undefined) =>
      may === true && schedules.choose(2, () => this.#state()) === 1;
    const makeHost = twin.backend?.makeHost ?? ((...args) => new FakeHost(...args));
    this.#host = makeHost(
      this.#backend.turn,
      {
        pin: () => (this.#backend.turn.on && refuses(world.pinsFail) ? "EIO" : undefined),
        release: () => !refuses(world.releasesFail),
      },
      { pinned: (...args) => this.#checks.pinned(...args), released: (gfn) => this.#checks.released(gfn) },
    );
    const quota = world.quota ?? Number.POSITIVE_INFINITY;
    const isRam = (gfn: number) => gfn < FRAMES;
    this.#checks = new Checks({
      host: this.#host,
      isRam,
      quota: () => quota,
      hostile: false,
      claims: new ClaimsModel(),
    });
    this.#tracker = this.#makeTracker(world, twin, regions, twin.backend?.quota?.() ?? quota);
    this.#backend.tracker = this.#tracker;
    this.#cpus = world.cpus.map((frames, id) => this.#makeCpu(id, frames, world, twin, regions));
    this.#turns.actors.push(this.#backend, ...this.#cpus);
  }

  get unpinned(): boolean {
    return this.#counters.framesUnpinned > 0;
  }

  play(): void {
    for (let actor = this.#turns.pick(); actor; actor = this.#turns.pick()) actor.resume();
    if (this.#tracker.dirty.on) this.#backend.harvest();
    const gate = new DeviceGate(this.#words, 7, () => {});
    const ram = this.#memory.regions;
    this.#checks.accounts(this.#tracker.frames(), this.#tracker.pinned, ram, (g) => gate.allows(g as Gfn));
    for (let gfn = 0; gfn < TABLE.first; gfn++)
      if (this.#memory.load32(unitOf(gfn)) & TU_COUNT)
        throw new Violation(`nobody maps frame ${gfn}, but its COUNT is not 0`);
  }

  /** Shared memory, how far everyone has come, and what the backend has seen: it decides by nothing else. */
  #state(): string {
    const units = new Int32Array(this.#memory.regions[0]!.bytes.buffer, TABLE.first * FRAME_SIZE, FRAMES);
    const cpus = this.#cpus.map((cpu) => `${cpu.operations}:${cpu.position}`);
    const { unharvested } = this.#checks;
    const seen = [this.#backend.history.join(), unharvested, windows(this.#words)];
    return [units.join(), cpus.join(";"), ...seen].join("|");
  }

  #makeTracker(world: SmallWorld, twin: Twin, regions: readonly GuestRegion[], quota: number): Tracker {
    const { turn } = this.#backend;
    const { openTable, makeIommu, makeSpeculator, makeTracker = newTracker } = twin.backend ?? {};
    let now = 0;
    const clock = {
      now: () => {
        now += CLOCK_STEP;
        return now as Nanoseconds;
      },
    };
    const idle = (index: number) => isIdleIommuWord(index, world.cpus.length);
    const memory = new SteppedMemory([], turn);
    const tracker = makeTracker(
      {
        ...{
          memory,
          clock,
          quota,
          counters: this.#counters,
          pinner: this.#host,
          policy: createPolicy("lru"),
        },
        ...{
          iommu: (makeIommu ?? newIommu)(new SteppedWords(this.#words, turn, idle), clock),
          beforeActivation: "none",
        },
        ...(openTable && { openTable }),
        ...(makeSpeculator && { makeSpeculator }),
      },
      this.#host,
    );
    tracker.setMemory(regions);
    if (!tracker.activate(TABLE.first * FRAME_SIZE, 1, true, world.harvests !== undefined))
      throw new InvariantViolation("no table");
    if (world.harvests !== undefined) tracker.dirty.start();
    if (world.extent) tracker.pin([{ gfn: 0, nrFrames: world.units.length }]);
    world.units.forEach((word, gfn) => {
      if (word & TU_PINNED) tracker.pin([{ gfn, nrFrames: 1 }]);
      this.#memory.store32(unitOf(gfn), word | 0);
    });
    if (world.speculate !== undefined) tracker.setSpeculation(createSpeculation(world.speculate));
    return tracker;
  }

  #makeCpu(
    id: number,
    frames: readonly number[],
    { cpus: { length: cpus }, harvests }: SmallWorld,
    twin: Twin,
    regions: readonly GuestRegion[],
  ): Process {
    const openUnits = twin.driver?.openUnits ?? ((...args) => new TrackingUnits(...args));
    const jobs = frames.map((gfn) => ({ gfn }));
    const process: Process = new Process(`cpu${id}`, this.#turns, () => program.next().value ?? undefined);
    const idle = (index: number) => isIdleIommuWord(index, cpus);
    const memory = new SteppedMemory(regions, process, {
      touched: (gpa, length) => this.#checks.transferred(gpa, length, true),
    });
    const geometry = { root: (TABLE.first * FRAME_SIZE) as Gpa, levels: 1 };
    const units = openUnits(memory, geometry, cpus, harvests !== undefined);
    const dma = new TrackedDma({
      direct: new DirectDma({ allocate: () => undefined, free: () => {} }),
      units,
      requests: this.#requests(process, units) as PinRequests,
      endpoint: ENDPOINT,
      counters: counters(DRIVER_COUNTERS, countersBuffer(DRIVER_COUNTERS)),
    });
    const gate = new DeviceGate(new SteppedWords(this.#words, process, idle), id, () => {});
    const device = new GatedMemory(memory, gate);
    const program = this.#program(jobs, dma, device);
    return process;
  }

  /** Map, let the device move data, unmap; a mapping that is refused is given up. */
  *#program(jobs: readonly { gfn: number }[], dma: TrackedDma, device: GatedMemory): Generator<Operation> {
    for (const { gfn } of jobs) {
      const at = gfn * FRAME_SIZE;
      let held = false;
      yield this.#operation(
        () => dma.mapSingle(at as Gpa, 8, "bidirectional"),
        () => {
          held = true;
          this.#checks.mapped([gfn]);
        },
      );
      if (!held) continue;
      yield this.#operation(
        () => device.transfer(at, 8, () => {}, "write"),
        () => this.#checks.unmapping([gfn]),
      );
      yield this.#operation(
        () => dma.unmapSingle(at as Iova, 8, "bidirectional"),
        () => {},
      );
    }
  }

  #operation(run: () => unknown, done: () => void): Operation {
    return {
      run,
      settle: (outcome) => {
        if ("value" in outcome) done();
        else if (outcome.error instanceof DmaMapFailed && outcome.error.reason === "refused")
          this.refused = true;
        else throw new Violation(String(outcome.error));
      },
    };
  }

  /** In place of the virtqueue, which the random worlds have: the request is there at once, the answer in a step. */
  #requests(turn: Turn, units: TrackingUnits): Pick<PinRequests, "pin"> {
    return {
      pin: (_endpoint, ranges) => {
        const ask = step(turn, "ask", (): Ask => {
          this.asked = true;
          const made: Ask = {
            ranges: [...ranges].map(([gfn, nrFrames]) => ({ gfn, nrFrames })),
            status: undefined,
          };
          this.#asks.push(made);
          return made;
        });
        turn.until(() => ask.status !== undefined);
        if (ask.status !== VIRTIO_IOMMU_S_OK) throw new DmaMapFailed("refused", ask.status);
        for (const { gfn } of ask.ranges) if (!units.pinned(gfn)) throw new DmaMapFailed("not-seen");
      },
    };
  }
}

/** The backend of a small machine: requests first, then what is left of its unpin passes. */
class SmallBackend implements Actor {
  readonly name = "backend";
  readonly wakeAt = Number.POSITIVE_INFINITY;
  readonly turn: HostTurn;
  /** The results of all its steps. */
  readonly history: unknown[] = [];
  tracker: Tracker | undefined;
  readonly #asks: readonly Ask[];
  readonly #checks: () => Checks;
  #served = 0;
  #passes: number;
  #harvests: number;
  #forced: number;
  #busy = false;

  constructor(
    turns: Turns,
    { passes, harvests = 0, forced = 0 }: SmallWorld,
    asks: readonly Ask[],
    checks: () => Checks,
  ) {
    this.#passes = passes;
    this.#harvests = harvests;
    this.#forced = forced;
    this.#checks = checks;
    this.#asks = asks;
    this.turn = new HostTurn(turns, this, { took: (result) => this.history.push(result) });
  }

  ready(): boolean {
    return this.#busy || this.#served < this.#asks.length || this.#passes + this.#harvests + this.#forced > 0;
  }

  resume(): void {
    this.#busy = this.turn.on = true;
    try {
      if (this.#served < this.#asks.length) this.#serve(this.#asks[this.#served]!);
      else if (this.#harvests > 0 && this.#harvests >= this.#passes) this.#nextHarvest();
      else if (this.#forced > 0) this.#force();
      else this.#pass();
    } finally {
      this.#busy = this.turn.on = false;
    }
  }

  #serve(ask: Ask): void {
    this.history.push("serve");
    ask.status = this.tracker!.pin(ask.ranges);
    this.#served++;
  }

  #nextHarvest(): void {
    this.history.push("harvest");
    this.#harvests--;
    this.harvest();
  }

  harvest(): void {
    this.#checks().harvestBegins();
    this.#checks().harvested(this.tracker!.dirty.harvest());
  }

  #force(): void {
    this.history.push("force");
    this.#forced--;
    this.tracker!.unpinIdle({ first: 0, end: FRAMES, from: 0 });
  }

  #pass(): void {
    this.history.push("pass");
    this.#passes--;
    this.tracker!.startPass();
    while (this.tracker!.slice());
  }
}

/** Which DMA windows are open, and the IOMMU's bits. */
const windows = (words: SharedArrayBuffer): string => new Int32Array(words).filter((w) => w !== 0).join();
