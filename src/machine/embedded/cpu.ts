import { invariant, UserError } from "../../base/errors.ts";
import { type Bdf, FRAME_SIZE, type Gfn } from "../../base/units.ts";
import { DRIVER_COUNTERS } from "../../driver/counters.ts";
import { DirectDma } from "../../driver/dma.ts";
import type { DmaApi } from "../../driver/dma-api.ts";
import { FaultCapableDma } from "../../driver/fault-capable-dma.ts";
import { DRIVERS, type FrontEndDriver, type FrontEndDrivers, type Places } from "../../driver/front-end.ts";
import { NvmeController, type NvmeIdentity } from "../../driver/nvme-controller.ts";
import { FramePool, RunPool } from "../../driver/pages.ts";
import { RecordingDma } from "../../driver/recording-dma.ts";
import { LazyQueue, RemappedDma } from "../../driver/remapped-dma.ts";
import type { DriverCpu } from "../../driver/viommu.ts";
import { monotonicClock } from "../../host/clock.ts";
import { Bell } from "../../memory/bell.ts";
import { counters } from "../../memory/counters.ts";
import { GuestMemory } from "../../memory/guest-memory.ts";
import { MailboxFunction } from "../../transport/mailbox.ts";
import type { FrontEndName } from "../../virtio/front-end.ts";
import { EventLogWriter } from "../../wire/event-log.ts";
import { CommandServer, type WorkerBase } from "../commands.ts";
import type { DeviceSetup, DiskSetup } from "./device.ts";
import { createLoad, type DeviceLink, type Load, type LoadSpec, registersOf } from "./load.ts";
import { type GuestRam, ramEnd, ramRegions } from "./ram.ts";
import { ThreadCpu } from "./thread-cpu.ts";
import type { Measurement } from "./workloads/workload.ts";

/** Frame 0 is not allocated, so that no buffer has the address 0. */
const FIRST_FRAME = 1;
/** Each CPU allocates from its own part of memory. */
export const framesOfCpu = (bytes: number, cpus: number): number =>
  Math.floor((bytes / FRAME_SIZE - FIRST_FRAME) / cpus);

/** Each CPU has its own part of a domain's addresses; above 4 GiB nothing is reserved. */
const FIRST_IOVA_PAGE = 2 ** 20;
const IOVA_PAGES = 2 ** 16;

/** A mapping that was refused is tried again after this time, if no device interrupts before. */
const RETRY_MS = 5;
/** A real disk does not interrupt: it is asked so often, and then again and again after a time in which others run. */
const POLLS = 200;
const NAP_MS = 0.05;

const STALLED =
  "the workload does not go on: a device does not answer, or no buffer can be mapped (is the quota too small?)";

/** Track devices, or remap them: unmapped addresses are taken back at once, or in batches. */
export type DriverMode = "coiommu" | "viommu-strict" | "viommu-lazy";

export interface CpuData {
  readonly number: number;
  readonly cpus: number;
  readonly ram: GuestRam;
  /** What its driver of our function does; null: there is none. */
  readonly driver: DriverMode | null;
  /** Which function that is. */
  readonly frontEnd: FrontEndName;
  /** Its device is fault-capable. */
  readonly faultCapable: boolean;
  readonly mailbox: SharedArrayBuffer;
  readonly backendBell: SharedArrayBuffer;
  /** Its interrupts, and its commands. */
  readonly bell: SharedArrayBuffer;
  readonly counters: SharedArrayBuffer;
  /** When the recording of its mappings began; null: there is none. */
  readonly recordingSince: number | null;
  /** Its device; undefined where there are fewer devices than CPUs. */
  readonly link: DeviceLink | undefined;
}

/** To each CPU, when the one that boots has made the table. */
export interface Attach {
  /** Null when nothing is tracked. */
  readonly places: Places | null;
  /** What it will do for the workload. */
  readonly load: LoadSpec | undefined;
}

/** A guest CPU: a thread that runs the guest's drivers and its part of the workload. */
export class CpuThread {
  readonly #data: CpuData;
  readonly #bell: Bell;
  readonly #commands: CommandServer;
  readonly #on: DriverCpu;
  readonly #pages: FramePool;
  readonly #drivers: FrontEndDrivers;
  readonly #log: EventLogWriter | undefined;
  #driver: FrontEndDriver | undefined;
  #remapped: RemappedDma | undefined;
  #load: Load | undefined;
  /** A real disk: on the CPU that boots. */
  #disk: NvmeController | undefined;

  constructor(data: CpuData & WorkerBase) {
    this.#data = data;
    const { number, cpus, ram, mailbox } = data;
    this.#drivers = DRIVERS[data.frontEnd];
    this.#bell = new Bell(data.bell);
    const backend = new Bell(data.backendBell);
    const memory = new GuestMemory(ramRegions(ram));
    this.#on = {
      memory,
      pciFunction: new MailboxFunction({ buffer: mailbox, client: number, ring: () => backend.ring() }),
      cpu: new ThreadCpu(),
      counters: counters(DRIVER_COUNTERS, data.counters),
    };
    const frames = framesOfCpu(ramEnd(ram), cpus);
    this.#pages = new FramePool(memory, (FIRST_FRAME + number * frames) as Gfn, frames);
    const { recordingSince } = data;
    if (recordingSince !== null)
      this.#log = new EventLogWriter(recordingSince, (lines) => this.#commands.tell("log", lines));
    this.#commands = new CommandServer(data, {
      // What a CPU executes first.
      reset: () => {},
      activate: () => this.#activate(),
      startDisk: (places: Places | null) => this.#startDisk(places),
      attach: (attach: Attach) => this.#attach(attach),
      createQueue: ({ queue, layout }: DiskSetup) => this.#disk!.createQueue(queue, layout),
      work: () => this.#work(),
      deleteQueue: ({ queue }: DiskSetup) => this.#disk!.deleteQueue(queue),
      release: () => this.#release(),
      stopDisk: () => this.#disk!.shutDown(),
      live: () => this.#live(),
    });
  }

  /** Runs until the machine is switched off: its thread is ended from outside. */
  run(): never {
    for (;;) {
      const { rings } = this.#bell;
      this.#commands.serve();
      this.#bell.sleep(rings, Number.POSITIVE_INFINITY);
    }
  }

  /** On the CPU that boots: find our function, and turn tracking on. */
  #activate(): Places {
    return this.#drivers.activate(this.#on, this.#pages, this.#data.cpus);
  }

  #open(places: Places | null): void {
    if (places) this.#driver ??= this.#drivers.open(this.#on, this.#data.number, places);
  }

  /** On the CPU that boots: bring a real disk up, with a queue for each CPU. */
  #startDisk(places: Places | null): NvmeIdentity {
    const { link, cpus } = this.#data;
    invariant(link && "bar" in link, "the disk is real");
    this.#open(places);
    const dma = this.#recorded(this.#dmaOf(link.endpoint), link.endpoint);
    const { memory, cpu } = this.#on;
    this.#disk = new NvmeController({ memory, dma, cpu, registers: registersOf(link.bar) }, cpus);
    return this.#disk.identity;
  }

  #attach({ places, load }: Attach): DeviceSetup | null {
    const { link, number } = this.#data;
    this.#open(places);
    if (!link || !load) return null;
    this.#load = createLoad(load, link, {
      memory: this.#on.memory,
      pages: this.#pages,
      dma: this.#recorded(this.#dmaOf(link.endpoint), link.endpoint),
      clock: monotonicClock,
      seed: 1 + number,
    });
    return this.#load.setup;
  }

  #dmaOf(endpoint: Bdf): DmaApi {
    const { driver, number, faultCapable } = this.#data;
    const direct = new DirectDma(this.#pages);
    if (!this.#driver) return direct;
    if (driver === "coiommu") {
      const tracked = this.#driver.dma(endpoint, direct);
      return faultCapable ? new FaultCapableDma(direct, tracked) : tracked;
    }
    const { domains } = this.#driver;
    if (!domains) throw new UserError(`the front end ${this.#data.frontEnd} has no domains`);
    // Of each CPU that uses the device: the first one makes the domain.
    domains.attach(endpoint, endpoint);
    const queue = new LazyQueue();
    this.#remapped = new RemappedDma({
      ...{ requests: domains, domain: endpoint, pages: this.#pages, counters: this.#on.counters },
      iovas: new RunPool(FIRST_IOVA_PAGE + number * IOVA_PAGES, IOVA_PAGES),
      ...(driver === "viommu-lazy" && { lazy: { clock: monotonicClock, queue } }),
    });
    return this.#remapped;
  }

  #recorded(dma: DmaApi, endpoint: Bdf): DmaApi {
    const source = { cpu: this.#data.number, endpoint };
    return this.#log ? new RecordingDma(dma, this.#log, monotonicClock, source) : dma;
  }

  /** The CPU that boots counts what devices report. */
  #pollFaults(): void {
    if (this.#data.number === 0) this.#driver?.pollFaults?.();
  }

  /** Its device knows its rings no more. */
  #release(): void {
    this.#load?.close();
    this.#remapped?.tick(true);
  }

  /** Mappings that the workload has left. */
  #live(): number {
    this.#pollFaults();
    this.#log?.flush();
    const { map, unmap } = this.#on.counters;
    if (this.#data.driver !== "coiommu") return map - unmap;
    // The table is that of all CPUs.
    return this.#data.number === 0 ? this.#driver!.survey().liveRefs : 0;
  }

  /** Until the workload has unmapped all that it mapped. */
  #work(): Measurement | null {
    if (!this.#load) return null;
    const { workload, patience } = this.#load;
    const polled = "bar" in this.#data.link!;
    let since = monotonicClock.now();
    let polls = 0;
    for (;;) {
      const { rings } = this.#bell;
      const progress = workload.poll();
      this.#remapped?.tick(workload.finished);
      this.#pollFaults();
      if (workload.finished) return workload.measurement;
      const now = monotonicClock.now();
      if (progress) {
        since = now;
        polls = 0;
      } else if (now - since < patience) {
        if (!polled || ++polls > POLLS) this.#bell.sleep(rings, polled ? NAP_MS : RETRY_MS);
      } else throw new UserError(STALLED, 1);
    }
  }
}
