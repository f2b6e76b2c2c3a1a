import { InvariantViolation } from "../base/errors.ts";
import type { Random } from "../base/random.ts";
import { FRAME_SIZE, framesIn, type Gfn, type Gpa, gpaOf, type Iova, milliseconds } from "../base/units.ts";
import { DRIVER_COUNTERS, type DriverCounters } from "../driver/counters.ts";
import { DirectDma } from "../driver/dma.ts";
import {
  type DmaApi,
  type DmaBuffer,
  type DmaDirection,
  DmaMapFailed,
  type DmaSegment,
  type PageAllocator,
} from "../driver/dma-api.ts";
import type { FrontEndDriver, Places } from "../driver/front-end.ts";
import { FramePool } from "../driver/pages.ts";
import { LazyQueue, RemappedDma, type RemappedDmaOptions } from "../driver/remapped-dma.ts";
import type { DriverCpu } from "../driver/viommu.ts";
import { counters } from "../memory/counters.ts";
import { VIRTIO_IOMMU_S_DEVERR, VIRTIO_IOMMU_S_IOERR, VIRTIO_IOMMU_S_NOMEM } from "../wire/virtio-iommu.ts";
import type { Balloon } from "./balloon.ts";
import type { DmaEngine, Job } from "./dma-engine.ts";
import type { Guest } from "./guest.ts";
import type { Mapping } from "./mapping.ts";
import { type Operation, Process } from "./process.ts";
import type { RemappedDevice } from "./remapped-device.ts";
import { SteppedMemory } from "./stepped-memory.ts";
import { StrayDma } from "./stray-dma.ts";
import { step, Violation } from "./turn.ts";
import type { Twin } from "./world.ts";

/** Mappings that a CPU has at most. */
const MAPPINGS_MAX = 4;
const SEGMENTS_MAX = 2;
const DOMAIN = 7;
/** The last of the things that a CPU chooses among. */
const MAP = 11;
const DIRECTIONS: readonly DmaDirection[] = ["bidirectional", "to-device", "from-device"];

type Ballooned = "no" | "in" | "wanted";

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
  #dma: DmaApi | undefined;
  /** Of the device that may be attached to a domain, tracked and remapped. */
  #otherDma: DmaApi | undefined;
  #remapped: RemappedDma | undefined;
  readonly #lazy = new LazyQueue();
  readonly #makeRemapped: (options: RemappedDmaOptions) => RemappedDma;
  #mappings: Mapping[] = [];
  /** A frame that only this CPU uses, and where it is. */
  readonly #own: Gfn;
  /** Of CPU 0 alone. */
  readonly #strays: StrayDma | undefined;
  #ballooned: Ballooned = "no";
  /** It has been mapped since it was there: else it is not worth being given away. */
  #ownUsed = false;

  constructor(
    guest: Guest,
    id: number,
    pool: { first: number; frames: number },
    random: Random,
    twin: Pick<Twin, "driver" | "remappedDma"> = {},
  ) {
    this.#guest = guest;
    this.#id = id;
    this.#pool = pool;
    this.#random = random;
    const { buffers } = guest.parts;
    this.#own = (buffers.first + buffers.frames + id) as Gfn;
    this.#pages = this.#freshPages();
    const buffer = new SharedArrayBuffer(8 * DRIVER_COUNTERS.length);
    this.counters = counters(DRIVER_COUNTERS, buffer);
    this.process = new Process(`cpu${id}`, guest.parts.turns, () => this.#next(), [
      new Float64Array(buffer),
      this.#lazy.words,
    ]);
    this.#on = {
      memory: new SteppedMemory(guest.parts.memory.regions, this.process, {
        constant: (gpa) => guest.isUpperLevel(gpa),
      }),
      pciFunction: guest.parts.bus.seenBy(this.process),
      cpu: { waitFor: (done, timeout) => this.process.waitFor(done, timeout) },
      counters: this.counters,
      knowsPinDirty: guest.parts.pinDirty,
      faulted: (report) => step(this.process, "told", () => guest.parts.faults.told(report)),
      ...twin.driver,
    };
    this.#strays = id === 0 ? new StrayDma(guest, random, () => this.#driver) : undefined;
    this.#makeRemapped = twin.remappedDma ?? ((options) => new RemappedDma(options));
  }

  get atRest(): boolean {
    const left = this.#mappings.length > 0 || this.#lazy.size > 0;
    return !this.process.busy && !left && (this.#strays?.atRest ?? true);
  }

  /** The machine is reset: begin anew. */
  reset(): void {
    this.process.abandon();
    this.#driver = undefined;
    this.#dma = this.#otherDma = this.#remapped = undefined;
    this.#lazy.clear();
    this.#mappings = [];
    this.#ballooned = "no";
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
      else if (this.#id > 0) return undefined;
      else return parts.mayBoot() ? this.#boot() : this.#useUntracked();
    }
    if (this.#id === 0 && needsRestart) return this.#restart();
    // A hostile guest unmaps under the device's hands.
    const idle = this.#mappings.filter((m) => m.jobs === 0 || this.#guest.parts.hostile);
    if (draining) {
      if (idle.length > 0) return this.#unmap(idle[0]!);
      if (this.#lazy.size > 0) return this.#tick(true);
      return this.#strays?.last();
    }
    if (parts.restarts && this.#id === 0 && this.#random(60) === 0) return this.#restart();
    if (this.#remapped && this.#random(20) === 0) return this.#tick(false);
    if (this.#id === 0 && this.#canMove && this.#random(3) === 0) return this.#move();
    const strays = this.#strays?.next();
    if (strays) return strays;
    const moved = parts.balloon && this.#useBalloon(parts.balloon);
    if (moved) return moved;
    if (parts.faultCapable?.atRest && this.#random(2) === 0) this.#touch(parts.faultCapable);
    const any = idle[this.#random(idle.length)];
    const choice = parts.hoards(this.#id) ? MAP : this.#random(MAP + 1);
    if (choice === 0) return this.#sleep();
    if (choice === 1) return this.#allocate();
    if (choice < 6 && any) this.#transfer(any);
    else if (choice < 9 && any) return this.#unmap(any);
    return this.#mappings.length < MAPPINGS_MAX ? this.#map() : this.#sleep();
  }

  /** A device works before the driver is there that would tell of it. */
  #useUntracked(): Operation {
    const guest = this.#guest;
    const { engines, memory, allPinned } = guest.parts;
    const engine = engines[this.#random(engines.length)]!;
    if (!engine.atRest) return this.#sleep();
    const { gpa, size } = memory.regions[this.#random(memory.regions.length)]!;
    engine.queue({
      segments: [{ iova: (gpa + FRAME_SIZE * this.#random(size / FRAME_SIZE)) as never, length: 512 }],
      // Later than this it breaks what a driver promises with COMPLETE: nobody tells of its writes.
      get writes() {
        return guest.places === undefined;
      },
      mayFault: () => !allPinned(),
      done: () => {},
    });
    return this.#sleep();
  }

  #use(places: Places): void {
    this.#driver = this.#guest.parts.frontEnd.open(this.#on, this.#id, places);
    const { endpoint, remapped } = this.#guest.parts;
    const pages = this.#loggedPages();
    const direct = new DirectDma(pages);
    this.#dma = this.#driver.dma(endpoint, direct);
    if (!remapped) return;
    this.#otherDma = this.#driver.dma(remapped.endpoint, direct);
    const clock = { now: () => step(this.process, "time", () => this.#guest.parts.turns.time) };
    this.#remapped = this.#makeRemapped({
      ...{ requests: this.#driver.domains!, domain: DOMAIN, pages, counters: this.counters },
      iovas: remapped.iovas(this.process, this.#id),
      ...(remapped.lazy && { lazy: { clock, queue: this.#lazy } }),
    });
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

  #buffers(ownToo: boolean): DmaBuffer[] {
    const { buffers } = this.#guest.parts;
    return Array.from({ length: 1 + this.#random(SEGMENTS_MAX) }, (): DmaBuffer => {
      if (ownToo && this.#random(3) === 0)
        return { gpa: gpaOf(this.#own), length: 1 + this.#random(FRAME_SIZE) };
      const frame = buffers.first + this.#random(buffers.frames);
      const offset = this.#random(4) * 1024;
      const length = Math.min(
        1 + this.#random(this.#random(2) === 0 ? 1000 : 6000),
        (buffers.first + buffers.frames - frame) * FRAME_SIZE - offset,
      );
      return { gpa: (frame * FRAME_SIZE + offset) as Gpa, length };
    });
  }

  /** A fault-capable device is given buffers of a program, which nobody has mapped. */
  #touch(engine: DmaEngine): void {
    const segments = this.#buffers(false).map(({ gpa, length }) => ({ iova: gpa as number as Iova, length }));
    engine.queue({ segments, writes: this.#random(2) === 0, unmapped: true, done: () => {} });
  }

  #map(): Operation {
    const list = this.#buffers(this.#guest.parts.balloon !== undefined && this.#ballooned === "no");
    const direction = DIRECTIONS[this.#random(DIRECTIONS.length)]!;
    const single = list.length === 1;
    const device = this.#chooseDevice();
    const dma = this.#dmaOf(device);
    const run = (): DmaSegment[] => {
      if (!single) return dma.mapSg(list, direction);
      const { gpa, length } = list[0]!;
      return [{ iova: dma.mapSingle(gpa, length, direction), length }];
    };
    const release = (segments: readonly DmaSegment[]) => () => {
      if (single) dma.unmapSingle(segments[0]!.iova, segments[0]!.length, direction);
      else dma.unmapSg(segments, direction);
    };
    const frames = list.flatMap(({ gpa, length }) => framesIn(gpa, length));
    return this.#mapping(device, run, (segments) => ({
      segments,
      frames,
      direction,
      release: release(segments),
    }));
  }

  #allocate(): Operation {
    const device = this.#chooseDevice();
    const dma = this.#dmaOf(device);
    const length = 1 + this.#random(2) * FRAME_SIZE;
    return this.#mapping(
      device,
      () => dma.allocCoherent(length),
      ({ gpa, iova }) => ({
        ...{ segments: [{ iova, length }], frames: framesIn(gpa, length), direction: "bidirectional" },
        release: () => dma.freeCoherent(gpa, iova, length),
      }),
    );
  }

  /** Give the own frame away when nothing maps it, and later have it back. */
  #useBalloon(balloon: Balloon): Operation | undefined {
    if (this.#random(3) > 0 || this.#mappings.some((m) => m.frames.includes(this.#own))) return undefined;
    if (this.#ballooned === "no" && !this.#ownUsed) return undefined;
    const moves: Record<Ballooned, [() => unknown, Ballooned]> = {
      no: [() => balloon.put(this.#own), "in"],
      in: [() => balloon.want(this.#own), "wanted"],
      wanted: [() => balloon.take(this.#own), "no"],
    };
    const [what, then] = moves[this.#ballooned];
    return this.#operation(
      () => step(this.process, "balloon", what),
      (done) => {
        if (done === false) return;
        this.#ballooned = then;
        this.#ownUsed = false;
      },
    );
  }

  #unmap(mapping: Mapping): Operation {
    this.#mappings = this.#mappings.filter((m) => m !== mapping);
    this.#guest.parts.checks.unmapping(mapping.frames);
    return this.#operation(mapping.release, () => {
      if (mapping.device) mapping.device.mappings--;
      if (this.counters.underflow > 0 && !this.#guest.parts.hostile)
        throw new Violation("a mapped frame was found with COUNT 0");
    });
  }

  // --- the device that moves between the table and a domain -----------------------------------------------------

  /** Whose the next mapping is. */
  #chooseDevice(): RemappedDevice | undefined {
    const { remapped } = this.#guest.parts;
    return remapped && !remapped.moving && this.#random(2) === 0 ? remapped : undefined;
  }

  #dmaOf(device: RemappedDevice | undefined): DmaApi {
    return device ? (device.attached ? this.#remapped! : this.#otherDma!) : this.#dma!;
  }

  get #canMove(): boolean {
    return this.#guest.parts.remapped?.mappings === 0;
  }

  #move(): Operation {
    const device = this.#guest.parts.remapped!;
    const { endpoint, attached } = device;
    device.moving = true;
    return this.#operation(
      () =>
        attached
          ? this.#driver!.domains!.detach(DOMAIN, endpoint)
          : this.#driver!.domains!.attach(DOMAIN, endpoint),
      () => {
        device.attached = !attached;
        device.moving = false;
        device.moves++;
      },
      (error) => {
        device.moving = false;
        // It cannot be told whether it was done; and a hostile guest may have lost our function.
        const { hostile } = this.#guest.parts;
        if (!(error instanceof DmaMapFailed && (hostile || error.status === VIRTIO_IOMMU_S_DEVERR)))
          throw error;
      },
    );
  }

  #tick(all: boolean): Operation {
    return this.#operation(
      () => this.#remapped!.tick(all),
      () => {},
    );
  }

  #sleep(): Operation {
    const time = milliseconds((1 + this.#random(20)) / 10);
    return this.#operation(
      () => this.process.waitFor(() => false, time),
      () => {},
    );
  }

  #transfer(mapping: Mapping): void {
    const { engines, remapped } = this.#guest.parts;
    const job: Job = {
      segments: mapping.segments,
      frames: mapping.frames,
      // A domain lets a device read no buffer that it is only to write.
      writes:
        mapping.direction !== "to-device" &&
        (this.#random(4) > 0 || (mapping.device !== undefined && mapping.direction === "from-device")),
      done: () => {
        mapping.jobs--;
      },
    };
    mapping.jobs++;
    const any = remapped ? engines.filter((e) => e !== remapped.engine) : engines;
    const engine = mapping.device?.engine ?? any[this.#random(any.length)]!;
    engine.queue(job);
  }

  #mapping<T>(
    device: RemappedDevice | undefined,
    run: () => T,
    made: (value: T) => Omit<Mapping, "jobs" | "device">,
  ): Operation {
    if (device) device.mappings++;
    const failed = this.#mapFailure();
    return this.#operation(
      run,
      (value) => {
        const mapping = made(value);
        this.#ownUsed ||= mapping.frames.includes(this.#own);
        this.#mappings.push({ ...mapping, device, jobs: 0 });
        this.#guest.parts.checks.mapped(mapping.frames);
      },
      (error) => {
        if (device) device.mappings--;
        failed(error);
      },
    );
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
