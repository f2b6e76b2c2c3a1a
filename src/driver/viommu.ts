import { ProtocolError } from "../base/errors.ts";
import { type Bdf, FRAME_SIZE, type Gpa } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import type { PciFunction } from "../virtio/device.ts";
import { layoutAt } from "../virtio/driver-queue.ts";
import type { QueueLayout } from "../virtio/queue.ts";
import { TU_COUNT, TU_PINNED } from "../wire/dtt.ts";
import {
  ASSIGNED_BITMAP_SIZE,
  Config,
  PIN_CONTROL_OFF,
  PIN_CONTROL_ON,
  PIN_FLAG_COMPLETE,
  PIN_STATUS_ON,
  VIRTIO_IOMMU_F_BYPASS_CONFIG,
  VIRTIO_IOMMU_F_MAP_UNMAP,
  VIRTIO_IOMMU_F_PIN_DIRTY,
  VIRTIO_IOMMU_F_PIN_PAGE,
} from "../wire/virtio-iommu.ts";
import type { DriverCounters } from "./counters.ts";
import type { Cpu } from "./cpu.ts";
import { TrackedDma } from "./dma.ts";
import { type DmaApi, DmaMapFailed, type PageAllocator } from "./dma-api.ts";
import { DomainRequests } from "./domain-requests.ts";
import { eventQueueAt, FaultEvents, type FaultReport } from "./fault-events.ts";
import { PinRequests } from "./pin-requests.ts";
import { eachUnit, surveyTable, type TableUse } from "./survey.ts";
import { buildTable, type TableGeometry } from "./table.ts";
import { TrackingUnits } from "./units.ts";
import { VirtioPciDriver, type VirtioPciPlaces } from "./virtio-pci.ts";

const bit = (feature: number): bigint => 1n << BigInt(feature);
const NEEDED = bit(VIRTIO_IOMMU_F_BYPASS_CONFIG) | bit(VIRTIO_IOMMU_F_PIN_PAGE);
const PIN_DIRTY = bit(VIRTIO_IOMMU_F_PIN_DIRTY);
const MAP_UNMAP = bit(VIRTIO_IOMMU_F_MAP_UNMAP);
const REQUEST_QUEUE = 0;
const EVENT_QUEUE = 1;
/** Frames pinned in one request when a table that is in use is taken up again. */
const LIVE_BATCH = 32;

/** Where the driver has put things: what every CPU needs to know, and all there is to know. */
export interface DriverPlaces {
  readonly pci: VirtioPciPlaces;
  readonly table: TableGeometry;
  readonly queue: QueueLayout;
  readonly events: QueueLayout;
  /** GPA of the page in which requests are made. */
  readonly page: Gpa;
  readonly bitmap: Gpa;
  readonly rangesMax: number;
  readonly cpus: number;
  /** PIN_DIRTY is negotiated. */
  readonly marksDirty: boolean;
}

/** A guest CPU, as the driver runs on it. */
export interface DriverCpu {
  readonly memory: GuestMemory;
  readonly pciFunction: PciFunction;
  readonly cpu: Cpu;
  readonly counters: DriverCounters;
  /** False: an old driver, which does not know PIN_DIRTY. */
  readonly knowsPinDirty?: boolean;
  /** Told of each DMA fault that the device has reported; they are counted as well. */
  readonly faulted?: (report: FaultReport) => void;
  /** The table's units; tests of the checkers put broken ones here. */
  readonly openUnits?: (...args: ConstructorParameters<typeof TrackingUnits>) => TrackingUnits;
}

/**
 * The guest driver for virtio-iommu with PIN_PAGE, on one CPU: the reference for guest/linux. The CPU that boots makes
 * it with activate(), the others from what that one found.
 */
export class GuestDriver {
  readonly places: DriverPlaces;
  readonly #on: DriverCpu;
  readonly #pci: VirtioPciDriver;
  readonly #units: TrackingUnits;
  readonly #requests: PinRequests;
  readonly #events: FaultEvents;
  /** For domains; ATTACH and DETACH move an endpoint that has no mappings. */
  readonly domains: DomainRequests;

  constructor(on: DriverCpu, places: DriverPlaces) {
    this.places = places;
    this.#on = on;
    this.#pci = new VirtioPciDriver(on.pciFunction, places.pci);
    const { openUnits = (...args) => new TrackingUnits(...args) } = on;
    this.#units = openUnits(on.memory, places.table, places.cpus, places.marksDirty);
    const notify = (queue: number) => () => this.#pci.notify(queue);
    const channel = { ...on, page: places.page, queue: places.queue, notify: notify(REQUEST_QUEUE) };
    this.#requests = new PinRequests({ ...channel, units: this.#units, rangesMax: places.rangesMax });
    this.domains = new DomainRequests(channel);
    this.#events = new FaultEvents({ ...on, queue: places.events, notify: notify(EVENT_QUEUE) });
  }

  /** Find the device, build the table, turn PIN on. Throws ProtocolError or DmaMapFailed "no-memory". */
  static activate(on: DriverCpu, pages: PageAllocator, cpus: number): GuestDriver {
    const allocate = (bytes: number) => {
      const gpa = pages.allocate(Math.ceil(bytes / FRAME_SIZE));
      if (gpa === undefined) throw new DmaMapFailed("no-memory");
      return gpa;
    };
    const pci = new VirtioPciDriver(on.pciFunction);
    const marksDirty = negotiate(pci, on);
    const queue = pci.setUpQueue(REQUEST_QUEUE, (size) => layoutAt(allocate(layoutAt(0, size).bytes), size));
    const events = pci.setUpQueue(EVENT_QUEUE, (size) => eventQueueAt(allocate(FRAME_SIZE), size));
    const driver = new GuestDriver(on, {
      pci: pci.places,
      table: buildTable(on.memory, pages),
      queue,
      events,
      page: allocate(FRAME_SIZE),
      bitmap: allocate(ASSIGNED_BITMAP_SIZE),
      rangesMax: readConfig(pci, "pinBatchMax"),
      cpus,
      marksDirty,
    });
    driver.#start();
    return driver;
  }

  /** The functions that must be tracked, as the device says. */
  assigned(): Bdf[] {
    const bitmap = new Uint8Array(ASSIGNED_BITMAP_SIZE);
    this.#on.memory.read(this.places.bitmap, bitmap);
    return Array.from({ length: 8 * bitmap.length }, (_, bdf) => bdf as Bdf).filter(
      (bdf) => bitmap[bdf >> 3]! & (1 << (bdf & 7)),
    );
  }

  survey(): TableUse {
    return surveyTable(this.#on.memory, this.#units);
  }

  /** The DMA API of a tracked function. */
  dma(endpoint: Bdf, direct: DmaApi): TrackedDma {
    const { counters } = this.#on;
    return new TrackedDma({ direct, units: this.#units, requests: this.#requests, endpoint, counters });
  }

  /** Take the device's reports of DMA faults; of one CPU at a time. */
  pollFaults(): void {
    this.#events.poll();
  }

  /** PIN off, and the device reset: new mappings fail, what is mapped stays so and can be unmapped. */
  deactivate(): void {
    this.#requests.enable(false);
    writeConfig(this.#pci, "pinControl", PIN_CONTROL_OFF);
    this.#pci.reset();
    this.#events.drain();
  }

  /**
   * Take the table up again after the device was reset. P in it means nothing any more (ADR 4), so it is cleared, and
   * what is mapped is asked for anew. Throws DmaMapFailed when that cannot be pinned; then mappings fail as before.
   */
  reactivate(endpoint: Bdf): void {
    const { queue } = this.places;
    this.#forgetPins();
    if (negotiate(this.#pci, this.#on) !== this.places.marksDirty)
      throw new ProtocolError("the device has changed its mind about PIN_DIRTY");
    this.#on.memory.write(queue.desc, new Uint8Array(layoutAt(queue.desc, queue.size).bytes));
    this.#pci.setUpQueue(REQUEST_QUEUE, () => queue);
    this.#pci.setUpQueue(EVENT_QUEUE, () => this.places.events);
    this.#start();
    this.#pinLive(endpoint);
  }

  #forgetPins(): void {
    const { memory } = this.#on;
    eachUnit(memory, this.#units, (_, unit) => {
      if (memory.load32(unit) & TU_PINNED) memory.and32(unit, ~TU_PINNED);
    });
  }

  #start(): void {
    this.#requests.setUp();
    this.#requests.forgetLost();
    this.#events.setUp();
    this.#pci.ready();
    const { bitmap, table } = this.places;
    // A write may be posted; the read of pin_status comes after all of them.
    writeConfig(this.#pci, "assignedBitmap", bitmap);
    writeConfig(this.#pci, "dttRoot", table.root);
    writeConfig(this.#pci, "dttLevels", table.levels);
    writeConfig(this.#pci, "pinFlags", PIN_FLAG_COMPLETE);
    writeConfig(this.#pci, "pinControl", PIN_CONTROL_ON);
    const status = readConfig(this.#pci, "pinStatus");
    if (status !== PIN_STATUS_ON)
      throw new ProtocolError(`the device refuses to turn PIN on: 0x${status.toString(16)}`);
    this.#requests.enable(true);
  }

  /** Each frame is counted up for the time, so that its P stays once set. */
  #pinLive(endpoint: Bdf): void {
    const live: number[] = [];
    const pinned = () => {
      const counted = live.splice(0).filter((gfn) => this.#units.get(gfn, 1) !== "saturated");
      try {
        this.#requests.pin(
          endpoint,
          counted.map((gfn) => [gfn, 1]),
        );
      } finally {
        for (const gfn of counted) this.#units.put(gfn, 1);
      }
    };
    eachUnit(this.#on.memory, this.#units, (gfn, unit) => {
      if (this.#on.memory.load32(unit) & TU_COUNT) live.push(gfn);
      if (live.length === LIVE_BATCH) pinned();
    });
    if (live.length > 0) pinned();
  }
}

/** Whether with PIN_DIRTY. */
function negotiate(pci: VirtioPciDriver, { knowsPinDirty = true }: DriverCpu): boolean {
  const features = pci.negotiate(NEEDED | MAP_UNMAP | (knowsPinDirty ? PIN_DIRTY : 0n));
  if ((features & NEEDED) !== NEEDED)
    throw new ProtocolError("the virtio-iommu has no PIN_PAGE, or no bypass: not a coIOMMU");
  // What the table tracks are guest-physical addresses.
  if (readConfig(pci, "bypass") !== 1) writeConfig(pci, "bypass", 1);
  if (readConfig(pci, "bypass") !== 1) throw new ProtocolError("the device does not let endpoints bypass");
  return (features & PIN_DIRTY) !== 0n;
}

type ConfigField = keyof typeof Config.fields;
const readConfig = (pci: VirtioPciDriver, name: ConfigField): number =>
  pci.configRead(Config.fields[name].at, Config.fields[name].size);
const writeConfig = (pci: VirtioPciDriver, name: ConfigField, value: number): void =>
  pci.configWrite(Config.fields[name].at, Config.fields[name].size, value);
