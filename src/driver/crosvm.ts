import { ProtocolError } from "../base/errors.ts";
import { type Bdf, FRAME_SIZE, type Gpa, milliseconds } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import type { PciFunction } from "../virtio/device.ts";
import {
  COIOMMU_BAR_SIZE,
  COIOMMU_CMD_ACTIVATE,
  COIOMMU_CMD_DEACTIVATE,
  COIOMMU_MMIO_BAR,
  COIOMMU_NOTIFYMAP_BAR,
  COIOMMU_TOPOLOGYMAP_BAR,
  COIOMMU_TRIGGERS,
  CoiommuRegisters,
  CoiommuSlot,
  PCI_DEVICE_ID_COIOMMU,
  PCI_VENDOR_ID_COIOMMU,
  PFN_SIZE,
  PIN_PAGES_IN_BATCH,
  PinPagesInfo,
} from "../wire/crosvm.ts";
import { barRegister, PCI_COMMAND_MASTER, PCI_COMMAND_MEMORY, PciHeader } from "../wire/pci.ts";
import { putUint } from "../wire/struct.ts";
import type { Cpu } from "./cpu.ts";
import { type PinRequester, TrackedDma } from "./dma.ts";
import { type DmaApi, DmaMapFailed, type PageAllocator } from "./dma-api.ts";
import type { FrameRange } from "./pin-batches.ts";
import { surveyTable, type TableUse } from "./survey.ts";
import { buildTable, type TableGeometry } from "./table.ts";
import { TrackingUnits } from "./units.ts";
import type { DriverCpu } from "./viommu.ts";

/** Where the driver puts the BARs; nothing else is on this bus. */
const BAR_BASE = 0xf000_0000;
const barAddress = (bar: number): number => BAR_BASE + bar * COIOMMU_BAR_SIZE;
/** A host that takes longer is taken for dead: the CPU spins all that time. */
const PIN_WAIT_MS = 5000;
/** Frames of a request's list, which fills a page; a longer one goes in several. */
const LIST_FRAMES = (FRAME_SIZE - PinPagesInfo.size) / PFN_SIZE;

/** Where the driver has put things: what every CPU needs to know. */
export interface CrosvmPlaces {
  readonly table: TableGeometry;
  /** GPAs of the page in which each CPU lists the frames of a request. */
  readonly lists: readonly Gpa[];
}

/** A guest's driver for the PCI function of crosvm's coIOMMU, on one CPU: does what ChromeOS kernels do. */
export class CrosvmDriver {
  readonly places: CrosvmPlaces;
  readonly #on: DriverCpu;
  readonly #units: TrackingUnits;
  readonly #requests: CrosvmRequests;

  /** `cpu`: its number; slots and lists are each CPU's own. */
  constructor(on: DriverCpu, cpu: number, places: CrosvmPlaces) {
    this.places = places;
    this.#on = on;
    const { openUnits = (...args) => new TrackingUnits(...args) } = on;
    this.#units = openUnits(on.memory, places.table, places.lists.length, false);
    this.#requests = new CrosvmRequests({ ...on, units: this.#units, slot: cpu, list: places.lists[cpu]! });
  }

  /** On CPU 0: find the function, build the table, activate. Throws ProtocolError or DmaMapFailed "no-memory". */
  static activate(on: DriverCpu, pages: PageAllocator, cpus: number): CrosvmDriver {
    const { memory, pciFunction } = on;
    enable(pciFunction);
    const lists = Array.from({ length: cpus }, () => {
      const page = pages.allocate(1);
      if (page === undefined) throw new DmaMapFailed("no-memory");
      return page;
    });
    const table = buildTable(memory, pages);
    writeRegister(pciFunction, "dttRoot", table.root);
    writeRegister(pciFunction, "dttLevel", table.levels);
    execute(pciFunction, COIOMMU_CMD_ACTIVATE);
    return new CrosvmDriver(on, 0, { table, lists });
  }

  /** The functions that must be tracked, as the device says. */
  assigned(): Bdf[] {
    const read = (index: number) =>
      Number(this.#on.pciFunction.barRead(barAddress(COIOMMU_TOPOLOGYMAP_BAR) + 2 * index, 2));
    const count = Math.min(read(0), COIOMMU_BAR_SIZE / 2 - 1);
    return Array.from({ length: count }, (_, i) => read(i + 1) as Bdf);
  }

  survey(): TableUse {
    return surveyTable(this.#on.memory, this.#units);
  }

  /** The DMA API of a function. */
  dma(endpoint: Bdf, direct: DmaApi): TrackedDma {
    const { counters } = this.#on;
    return new TrackedDma({ direct, units: this.#units, requests: this.#requests, endpoint, counters });
  }

  deactivate(): void {
    execute(this.#on.pciFunction, COIOMMU_CMD_DEACTIVATE);
  }
}

interface CrosvmRequestsOptions extends DriverCpu {
  readonly units: TrackingUnits;
  readonly slot: number;
  readonly list: Gpa;
}

/** Pins through this CPU's slot: written, triggered, and polled until it is 0. P then says whether it was done. */
class CrosvmRequests implements PinRequester {
  readonly #memory: GuestMemory;
  readonly #function: PciFunction;
  readonly #cpu: Cpu;
  readonly #o: CrosvmRequestsOptions;

  constructor(options: CrosvmRequestsOptions) {
    this.#memory = options.memory;
    this.#function = options.pciFunction;
    this.#cpu = options.cpu;
    this.#o = options;
  }

  pin(endpoint: Bdf, ranges: Iterable<FrameRange>): void {
    const { units, counters } = this.#o;
    const asked: number[] = [];
    for (const [first, nr] of ranges)
      for (let gfn = first; gfn < first + nr; gfn++) if (!units.pinned(gfn)) asked.push(gfn);
    for (let done = 0; done < asked.length; done += LIST_FRAMES)
      this.#ask(endpoint, asked.slice(done, done + LIST_FRAMES));
    if (!asked.every((gfn) => units.pinned(gfn))) {
      counters.pinNotSeen++;
      throw new DmaMapFailed("not-seen");
    }
    counters.pinFrames += asked.length;
  }

  #ask(endpoint: Bdf, gfns: readonly number[]): void {
    const { slot, counters } = this.#o;
    const at = barAddress(COIOMMU_NOTIFYMAP_BAR) + slot * CoiommuSlot.size;
    const free = () => this.#function.barRead(at, CoiommuSlot.size) === 0n;
    // Of a request that was given up: the device may still be reading the list.
    if (!free()) {
      counters.pinOff++;
      throw new DmaMapFailed("off");
    }
    this.#function.barWrite(at, CoiommuSlot.size, this.#data(endpoint, gfns));
    counters.pinRequests++;
    this.#function.barWrite(barAddress(COIOMMU_MMIO_BAR) + COIOMMU_TRIGGERS + slot, 1, 1n);
    if (this.#cpu.waitFor(free, milliseconds(PIN_WAIT_MS))) return;
    counters.pinLost++;
    throw new DmaMapFailed("lost");
  }

  #data(endpoint: Bdf, gfns: readonly number[]): bigint {
    if (gfns.length === 1) return (BigInt(gfns[0]!) << 16n) | BigInt(endpoint);
    const { list } = this.#o;
    const bytes = PinPagesInfo.encode({ bdf: endpoint, nrPages: gfns.length }, gfns.length * PFN_SIZE);
    gfns.forEach((gfn, i) => void putUint(bytes, PinPagesInfo.size + i * PFN_SIZE, PFN_SIZE, BigInt(gfn)));
    this.#memory.write(list, bytes);
    return BigInt(list) | PIN_PAGES_IN_BATCH;
  }
}

function enable(pciFunction: PciFunction): void {
  const { vendorId, deviceId } = PciHeader.fields;
  const read = ({ at, size }: { at: number; size: number }) => pciFunction.configRead(at, size);
  if (read(vendorId) !== PCI_VENDOR_ID_COIOMMU || read(deviceId) !== PCI_DEVICE_ID_COIOMMU)
    throw new ProtocolError("the function is no coIOMMU of crosvm's kind");
  for (const bar of [COIOMMU_MMIO_BAR, COIOMMU_NOTIFYMAP_BAR, COIOMMU_TOPOLOGYMAP_BAR])
    pciFunction.configWrite(barRegister(bar), 4, barAddress(bar));
  pciFunction.configWrite(PciHeader.fields.command.at, 2, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
}

function writeRegister(
  pciFunction: PciFunction,
  name: keyof typeof CoiommuRegisters.fields,
  value: number,
): void {
  const { at, size } = CoiommuRegisters.fields[name];
  pciFunction.barWrite(barAddress(COIOMMU_MMIO_BAR) + at, size, BigInt(value));
}

/** The read comes back when the write has been done. */
function execute(pciFunction: PciFunction, command: number): void {
  writeRegister(pciFunction, "command", command);
  const { at, size } = CoiommuRegisters.fields.command;
  pciFunction.barRead(barAddress(COIOMMU_MMIO_BAR) + at, size);
}
