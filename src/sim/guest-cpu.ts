import { InvariantViolation } from "../base/errors.ts";
import type { Random } from "../base/random.ts";
import { FRAME_SIZE, type Gfn, type Gpa, gfnOf, milliseconds } from "../base/units.ts";
import { DRIVER_COUNTERS, type DriverCounters } from "../driver/counters.ts";
import { DirectDma, type TrackedDma } from "../driver/dma.ts";
import {
  type DmaBuffer,
  type DmaDirection,
  DmaMapFailed,
  type DmaSegment,
  type PageAllocator,
} from "../driver/dma-api.ts";
import { FramePool } from "../driver/pages.ts";
import type { DriverCpu } from "../driver/viommu.ts";
import { counters } from "../memory/counters.ts";
import { VIRTIO_IOMMU_S_IOERR, VIRTIO_IOMMU_S_NOMEM } from "../wire/virtio-iommu.ts";
import type { Job } from "./dma-engine.ts";
import type { FrontEndDriver, Places } from "./front-end.ts";
import type { Guest } from "./guest.ts";
import { type Operation, Process } from "./process.ts";
import { SteppedMemory } from "./stepped-memory.ts";
import { step, Violation } from "./turn.ts";

/** Mappings that a CPU has at most. */
const MAPPINGS_MAX = 4;
const SEGMENTS_MAX = 2;
const DIRECTIONS: readonly DmaDirection[] = ["bidirectional", "to-device", "from-device"];

interface Mapping {
  readonly segments: readonly DmaSegment[];
  readonly frames: readonly number[];
  readonly direction: DmaDirection;
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
  #driver: FrontEndDriver | undefined;
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
    this.process = new Process(`cpu${id}`, guest.parts.turns, () => this.#next(), [new Float64Array(buffer)]);
    this.#on = {
      memory: new SteppedMemory(guest.parts.memory.regions, this.process, {
        constant: (gpa) => guest.isUpperLevel(gpa),
      }),
      pciFunction: guest.parts.bus.seenBy(this.process),
      cpu: { waitFor: (done, timeout) => this.process.waitFor(done, timeout) },
      counters: this.counters,
      knowsPinDirty: guest.parts.pinDirty,
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
    return new FramePool(this.#guest.parts.memory, this.#pool.first as Gfn, this.#pool.frames);
  }

  // --- what it does next -----------------------------------------------------------------------------------------

  #next(): Operation | undefined {
    const { places, draining, needsRestart, parts } = this.#guest;
    if (!this.#driver) {
      if (places) this.#use(places);
      else return this.#id === 0 ? this.#boot() : undefined;
    }
    if (this.#id === 0 && needsRestart) return this.#restart();
    // A hostile guest unmaps under the device's hands.
    const idle = this.#mappings.filter((m) => m.jobs === 0 || this.#guest.parts.hostile);
    if (draining) return idle.length > 0 ? this.#unmap(idle[0]!) : undefined;
    if (parts.restarts && this.#id === 0 && this.#random(60) === 0) return this.#restart();
    const any = idle[this.#random(idle.length)];
    const choice = this.#random(12);
    if (choice === 0) return this.#sleep();
    if (choice === 1) return this.#allocate();
    if (choice < 6 && any) this.#transfer(any);
    else if (choice < 9 && any) return this.#unmap(any);
    return this.#mappings.length < MAPPINGS_MAX ? this.#map() : this.#sleep();
  }

  #use(places: Places): void {
    this.#driver = this.#guest.parts.frontEnd.open(this.#on, this.#id, places);
    this.#dma = this.#driver.dma(this.#guest.parts.endpoint, new DirectDma(this.#loggedPages()));
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
    const { frontEnd, cpus } = this.#guest.parts;
    return this.#operation(
      () => frontEnd.activate(this.#on, this.#loggedPages(), cpus),
      (places) => {
        this.#guest.places = places;
        this.#guest.settled(diedAgain());
        this.#use(places);
      },
      () => {},
    );
  }

  #restart(): Operation {
    this.#guest.needsRestart = true;
    this.#guest.pinOff.begin();
    const diedAgain = this.#guest.deviceLost.again();
    return this.#operation(
      () => this.#driver!.restart!(this.#guest.parts.endpoint),
      () => {
        this.#guest.driverRestarts++;
        this.#guest.settled(diedAgain());
      },
      // What is mapped could not be pinned anew, for now; or the device has gone again.
      () => {},
    );
  }

  #map(): Operation {
    const { buffers } = this.#guest.parts;
    const list = Array.from({ length: 1 + this.#random(SEGMENTS_MAX) }, (): DmaBuffer => {
      const frame = buffers.first + this.#random(buffers.frames);
      const offset = this.#random(4) * 1024;
      const length = Math.min(
        1 + this.#random(this.#random(2) === 0 ? 1000 : 6000),
        (buffers.first + buffers.frames - frame) * FRAME_SIZE - offset,
      );
      return { gpa: (frame * FRAME_SIZE + offset) as Gpa, length };
    });
    const direction = DIRECTIONS[this.#random(DIRECTIONS.length)]!;
    const single = list.length === 1;
    const dma = this.#dma!;
    const run = (): DmaSegment[] => {
      if (!single) return dma.mapSg(list, direction);
      const { gpa, length } = list[0]!;
      return [{ iova: dma.mapSingle(gpa, length, direction), length }];
    };
    const release = (segments: readonly DmaSegment[]) => () => {
      if (single) dma.unmapSingle(segments[0]!.iova, segments[0]!.length, direction);
      else dma.unmapSg(segments, direction);
    };
    return this.#operation(run, (segments) => this.#hold(segments, direction, release(segments)));
  }

  #allocate(): Operation {
    const dma = this.#dma!;
    const length = 1 + this.#random(2) * FRAME_SIZE;
    return this.#operation(
      () => dma.allocCoherent(length),
      ({ gpa, iova }) =>
        this.#hold([{ iova, length }], "bidirectional", () => dma.freeCoherent(gpa, iova, length)),
    );
  }

  #unmap(mapping: Mapping): Operation {
    this.#mappings = this.#mappings.filter((m) => m !== mapping);
    this.#guest.parts.checks.unmapping(mapping.frames);
    return this.#operation(mapping.release, () => {
      if (this.counters.underflow > 0 && !this.#guest.parts.hostile)
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
    const { engines } = this.#guest.parts;
    const job: Job = {
      segments: mapping.segments,
      writes: mapping.direction !== "to-device" && this.#random(4) > 0,
      done: () => {
        mapping.jobs--;
      },
    };
    mapping.jobs++;
    engines[this.#random(engines.length)]!.queue(job);
  }

  #hold(segments: readonly DmaSegment[], direction: DmaDirection, release: () => void): void {
    const frames = segments.flatMap(({ iova, length }) => {
      const first = gfnOf(iova);
      return Array.from({ length: gfnOf(iova + length - 1) - first + 1 }, (_, i) => first + i);
    });
    this.#mappings.push({ segments, frames, direction, jobs: 0, release });
    this.#guest.parts.checks.mapped(frames);
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
    const { pinOff, deviceLost, parts } = this.#guest;
    const wasOff = pinOff.since();
    const wasLost = deviceLost.since();
    return (error) => {
      if (parts.hostile) return;
      if (!(error instanceof DmaMapFailed)) throw error;
      const { reason, status } = error;
      const excused = {
        refused: status === VIRTIO_IOMMU_S_NOMEM || status === VIRTIO_IOMMU_S_IOERR,
        off: wasOff() || wasLost(),
        lost: wasLost(),
        "no-memory": true,
        "no-unit": false,
        saturated: false,
        "not-seen": !parts.frontEnd.tellsWhy,
      };
      if (excused[reason]) return;
      throw new Violation(`a mapping failed: ${reason}${status === undefined ? "" : `, status ${status}`}`);
    };
  }
}
