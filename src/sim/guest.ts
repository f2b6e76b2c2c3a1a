import { InvariantViolation } from "../base/errors.ts";
import type { Random } from "../base/random.ts";
import { type Bdf, FRAME_SIZE, type Gpa, gfnOf, milliseconds } from "../base/units.ts";
import { DRIVER_COUNTERS, type DriverCounters } from "../driver/counters.ts";
import { DirectDma, type TrackedDma } from "../driver/dma.ts";
import { type DmaBuffer, DmaMapFailed, type DmaSegment, type PageAllocator } from "../driver/dma-api.ts";
import { FramePool } from "../driver/pages.ts";
import { type DriverCpu, type DriverPlaces, GuestDriver } from "../driver/viommu.ts";
import { counters } from "../memory/counters.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import { VIRTIO_IOMMU_S_IOERR, VIRTIO_IOMMU_S_NOMEM } from "../wire/virtio-iommu.ts";
import type { Bus } from "./bus.ts";
import type { Checks } from "./checks.ts";
import type { DmaEngine, Job } from "./dma-engine.ts";
import { SteppedMemory } from "./stepped-memory.ts";
import { type Operation, Process, step, type Turns, Violation } from "./turn.ts";

/** Mappings that a CPU has at most. */
const MAPPINGS_MAX = 4;
const SEGMENTS_MAX = 2;
const DIRECTION = "bidirectional";

/** Something that excuses failures from when it begins until it ends, and of what was under way meanwhile. */
class Disturbance {
  #active = false;
  #count = 0;

  begin(): void {
    this.#active = true;
    this.#count++;
  }
  end(): void {
    this.#active = false;
  }

  /** Whether it has begun anew since this call. */
  again(): () => boolean {
    const before = this.#count;
    return () => this.#count !== before;
  }

  /** Whether it was on at any time since this call. */
  since(): () => boolean {
    const before = this.#count;
    const active = this.#active;
    return () => active || this.#active || this.#count !== before;
  }
}

/** What the CPUs of one guest share, beside its memory. */
export class Guest {
  /** Set by the CPU that boots, when its driver is active. */
  places: DriverPlaces | undefined;
  /** The device has been reset behind the driver's back, as a real one tells by an interrupt. */
  needsRestart = false;
  /** The device has forgotten what it was asked: who waits for its answer gives up after a time, and is right to. */
  readonly deviceLost = new Disturbance();
  /** PIN is off. */
  readonly pinOff = new Disturbance();
  driverRestarts = 0;
  /** No new mappings: unmap what there is, and stop. */
  draining = false;
  readonly memory: GuestMemory;
  readonly turns: Turns;
  readonly bus: Bus;
  readonly checks: Checks;
  readonly endpoint: Bdf;
  readonly engines: readonly DmaEngine[];
  /** First frame and number of those that buffers lie in; CPUs share them. */
  readonly buffers: { readonly first: number; readonly frames: number };
  readonly cpus: number;
  readonly hostile: boolean;
  readonly restarts: boolean;

  constructor(
    o: Pick<
      Guest,
      | "memory"
      | "turns"
      | "bus"
      | "checks"
      | "endpoint"
      | "engines"
      | "buffers"
      | "cpus"
      | "hostile"
      | "restarts"
    >,
  ) {
    this.memory = o.memory;
    this.turns = o.turns;
    this.bus = o.bus;
    this.checks = o.checks;
    this.endpoint = o.endpoint;
    this.engines = o.engines;
    this.buffers = o.buffers;
    this.cpus = o.cpus;
    this.hostile = o.hostile;
    this.restarts = o.restarts;
  }

  /** The driver is active; `diedAgain`: but not on the device that it found. */
  settled(diedAgain: boolean): void {
    if (diedAgain) return;
    this.needsRestart = false;
    this.deviceLost.end();
    this.pinOff.end();
  }

  /** The upper levels of a table that is in use: an honest driver changes none of it. */
  isConstant(gpa: number): boolean {
    if (!this.places || this.hostile) return false;
    const { root, levels } = this.places.table;
    return levels > 1 && gpa >= root && gpa < root + FRAME_SIZE;
  }
}

interface Mapping {
  readonly segments: readonly DmaSegment[];
  readonly frames: readonly number[];
  /** DMA under way in it. */
  jobs: number;
  readonly release: () => void;
}

/** A guest CPU: runs the production driver in a program of random mappings, DMA, and unmappings. */
export class GuestCpu {
  readonly process: Process;
  readonly counters: DriverCounters;
  readonly #guest: Guest;
  readonly #id: number;
  readonly #random: Random;
  readonly #on: DriverCpu;
  readonly #pool: { readonly first: number; readonly frames: number };
  #pages: FramePool;
  #driver: GuestDriver | undefined;
  #dma: TrackedDma | undefined;
  #mappings: Mapping[] = [];

  constructor(
    guest: Guest,
    id: number,
    pool: { first: number; frames: number },
    random: Random,
    twin: Partial<DriverCpu> = {},
  ) {
    this.#guest = guest;
    this.#id = id;
    this.#pool = pool;
    this.#random = random;
    this.#pages = this.#freshPages();
    const buffer = new SharedArrayBuffer(8 * DRIVER_COUNTERS.length);
    this.counters = counters(DRIVER_COUNTERS, buffer);
    this.process = new Process(`cpu${id}`, guest.turns, () => this.#next(), [new Float64Array(buffer)]);
    this.#on = {
      memory: new SteppedMemory(guest.memory.regions, this.process, {
        constant: (gpa) => guest.isConstant(gpa),
      }),
      pciFunction: guest.bus.seenBy(this.process),
      cpu: { waitFor: (done, timeout) => this.process.waitFor(done, timeout) },
      counters: this.counters,
      ...twin,
    };
  }

  get atRest(): boolean {
    return !this.process.busy && this.#mappings.length === 0;
  }

  /** The machine is reset: begin anew. */
  reset(): void {
    this.process.abandon();
    this.#driver = undefined;
    this.#dma = undefined;
    this.#mappings = [];
    this.#pages = this.#freshPages();
  }

  #freshPages(): FramePool {
    return new FramePool(this.#guest.memory, this.#pool.first as never, this.#pool.frames);
  }

  // --- what it does next -----------------------------------------------------------------------------------------

  #next(): Operation | undefined {
    const { places, draining, needsRestart, restarts } = this.#guest;
    if (!this.#driver) {
      if (places) this.#use(new GuestDriver(this.#on, places));
      else return this.#id === 0 ? this.#boot() : undefined;
    }
    if (this.#id === 0 && needsRestart) return this.#restart();
    // A hostile guest unmaps under the device's hands.
    const idle = this.#mappings.filter((m) => m.jobs === 0 || this.#guest.hostile);
    if (draining) return idle.length > 0 ? this.#unmap(idle[0]!) : undefined;
    if (restarts && this.#id === 0 && this.#random(60) === 0) return this.#restart();
    const any = idle[this.#random(idle.length)];
    const choice = this.#random(12);
    if (choice === 0) return this.#sleep();
    if (choice === 1) return this.#allocate();
    if (choice < 6 && any) this.#transfer(any);
    else if (choice < 9 && any) return this.#unmap(any);
    return this.#mappings.length < MAPPINGS_MAX ? this.#map() : this.#sleep();
  }

  #use(driver: GuestDriver): void {
    this.#driver = driver;
    this.#dma = driver.dma(this.#guest.endpoint, new DirectDma(this.#loggedPages()));
  }

  /** Allocation is no step, but must not be done again when the operation is run again. */
  #loggedPages(): PageAllocator {
    const { process } = this;
    return {
      allocate: (frames) => step(process, "allocate", () => this.#pages.allocate(frames)),
      free: (gpa, frames) => step(process, "free", () => this.#pages.free(gpa, frames)),
    };
  }

  // --- operations ------------------------------------------------------------------------------------------------

  #boot(): Operation {
    this.#pages = this.#freshPages();
    const diedAgain = this.#guest.deviceLost.again();
    const run = () => GuestDriver.activate(this.#on, this.#loggedPages(), this.#guest.cpus);
    return this.#operation(
      run,
      (driver) => {
        this.#guest.places = driver.places;
        this.#guest.settled(diedAgain());
        this.#use(driver);
      },
      () => {},
    );
  }

  #restart(): Operation {
    this.#guest.needsRestart = true;
    this.#guest.pinOff.begin();
    const diedAgain = this.#guest.deviceLost.again();
    const run = () => {
      this.#driver!.deactivate();
      this.#driver!.reactivate(this.#guest.endpoint);
    };
    return this.#operation(
      run,
      () => {
        this.#guest.driverRestarts++;
        this.#guest.settled(diedAgain());
      },
      // What is mapped could not be pinned anew, for now; or the device has gone again.
      () => {},
    );
  }

  #map(): Operation {
    const { buffers } = this.#guest;
    const list = Array.from({ length: 1 + this.#random(SEGMENTS_MAX) }, (): DmaBuffer => {
      const frame = buffers.first + this.#random(buffers.frames);
      const offset = this.#random(4) * 1024;
      const length = Math.min(
        1 + this.#random(this.#random(2) === 0 ? 1000 : 6000),
        (buffers.first + buffers.frames - frame) * FRAME_SIZE - offset,
      );
      return { gpa: (frame * FRAME_SIZE + offset) as Gpa, length };
    });
    const single = list.length === 1;
    const dma = this.#dma!;
    const run = (): DmaSegment[] => {
      if (!single) return dma.mapSg(list, DIRECTION);
      const { gpa, length } = list[0]!;
      return [{ iova: dma.mapSingle(gpa, length, DIRECTION), length }];
    };
    const release = (segments: readonly DmaSegment[]) => () => {
      if (single) dma.unmapSingle(segments[0]!.iova, segments[0]!.length, DIRECTION);
      else dma.unmapSg(segments, DIRECTION);
    };
    return this.#operation(run, (segments) => this.#hold(segments, release(segments)));
  }

  #allocate(): Operation {
    const dma = this.#dma!;
    const length = 1 + this.#random(2) * FRAME_SIZE;
    return this.#operation(
      () => dma.allocCoherent(length),
      ({ gpa, iova }) => this.#hold([{ iova, length }], () => dma.freeCoherent(gpa, iova, length)),
    );
  }

  #unmap(mapping: Mapping): Operation {
    this.#mappings = this.#mappings.filter((m) => m !== mapping);
    this.#guest.checks.unmapping(mapping.frames);
    return this.#operation(mapping.release, () => {
      if (this.counters.underflow > 0 && !this.#guest.hostile)
        throw new Violation("a mapped frame was found with COUNT 0");
    });
  }

  #sleep(): Operation {
    const time = milliseconds((1 + this.#random(20)) / 10);
    return this.#operation(
      () => this.process.waitFor(() => false, time),
      () => {},
    );
  }

  #transfer(mapping: Mapping): void {
    const { engines } = this.#guest;
    const job: Job = {
      segments: mapping.segments,
      done: () => {
        mapping.jobs--;
      },
    };
    mapping.jobs++;
    engines[this.#random(engines.length)]!.queue(job);
  }

  #hold(segments: readonly DmaSegment[], release: () => void): void {
    const frames = segments.flatMap(({ iova, length }) => {
      const first = gfnOf(iova);
      return Array.from({ length: gfnOf(iova + length - 1) - first + 1 }, (_, i) => first + i);
    });
    this.#mappings.push({ segments, frames, jobs: 0, release });
    this.#guest.checks.mapped(frames);
  }

  #operation<T>(run: () => T, done: (value: T) => void, failed = this.#mapFailure()): Operation {
    return {
      run,
      settle: (outcome) => {
        if ("value" in outcome) done(outcome.value as T);
        else if (outcome.error instanceof InvariantViolation) throw outcome.error;
        else failed(outcome.error);
      },
    };
  }

  /** Whether a mapping may fail so: refused for want of memory, or because of what befell the device. */
  #mapFailure(): (error: unknown) => void {
    const { hostile, pinOff, deviceLost } = this.#guest;
    const wasOff = pinOff.since();
    const wasLost = deviceLost.since();
    return (error) => {
      if (hostile) return;
      if (!(error instanceof DmaMapFailed)) throw error;
      const { reason, status } = error;
      const excused = {
        refused: status === VIRTIO_IOMMU_S_NOMEM || status === VIRTIO_IOMMU_S_IOERR,
        off: wasOff() || wasLost(),
        lost: wasLost(),
        "no-memory": true,
        "no-unit": false,
        saturated: false,
        "not-seen": false,
      };
      if (excused[reason]) return;
      throw new Violation(`a mapping failed: ${reason}${status === undefined ? "" : `, status ${status}`}`);
    };
  }
}
