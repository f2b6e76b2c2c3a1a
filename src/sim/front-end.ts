import type { Bdf, Gpa } from "../base/units.ts";
import { CrosvmDriver, type CrosvmPlaces } from "../driver/crosvm.ts";
import type { TrackedDma } from "../driver/dma.ts";
import type { DmaApi, PageAllocator } from "../driver/dma-api.ts";
import type { DomainRequests } from "../driver/domain-requests.ts";
import type { TableGeometry } from "../driver/table.ts";
import { type DriverCpu, type DriverPlaces, GuestDriver } from "../driver/viommu.ts";
import { VirtioPciDriver } from "../driver/virtio-pci.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import type { Tracker } from "../tracking/tracker.ts";
import { CrosvmFunction } from "../virtio/crosvm-function.ts";
import type { Assigned, PciFunction } from "../virtio/device.ts";
import { EVENT_QUEUE, VirtioIommu } from "../virtio/iommu.ts";
import { VirtioPciFunction } from "../virtio/pci.ts";
import { Config } from "../wire/virtio-iommu.ts";

/** A guest driver on one CPU, whichever function it drives. */
export interface FrontEndDriver {
  dma(endpoint: Bdf, direct: DmaApi): TrackedDma;
  /** Take the table up again: of a driver that can. */
  restart?(endpoint: Bdf): void;
  /** Of a driver that knows domains. */
  readonly domains?: DomainRequests;
  /** Take the device's fault reports: of a driver that gets some. */
  pollFaults?(): void;
  setBypass?(on: boolean): void;
}

/** Where a driver has put things. */
export interface Places<Own = unknown> {
  readonly own: Own;
  readonly table: TableGeometry;
  /** Pages in which it and the device meet, beside the table. */
  readonly pages: readonly Gpa[];
  readonly eventBuffers: number;
}

/** The backend's side of a function. */
export interface Served {
  readonly pci: PciFunction;
  /** Tell the guest of DMA faults, if the function can. */
  reportFaults(): void;
}

/** One of the PCI functions that the backend answers as, and its driver. */
export interface FrontEnd<Own = unknown> {
  /** Whether a driver learns why it was refused; otherwise it only sees that P is clear. */
  readonly tellsWhy: boolean;
  serve(o: { memory: GuestMemory; tracker: Tracker; assigned: Assigned }): Served;
  /** On CPU 0. */
  activate(on: DriverCpu, pages: PageAllocator, cpus: number): Places<Own>;
  open(on: DriverCpu, cpu: number, places: Places<Own>): FrontEndDriver;
}

const virtioIommu: FrontEnd<DriverPlaces> = {
  tellsWhy: true,
  serve(o) {
    const device = new VirtioIommu({ ...o, pinPage: true, hostError: () => {} });
    const pci = new VirtioPciFunction(device, o.memory);
    return { pci, reportFaults: () => pci.withQueue(EVENT_QUEUE, (queue) => device.reportFaults(queue)) };
  },
  activate(on, allocator, cpus) {
    const own = GuestDriver.activate(on, allocator, cpus).places;
    const pages = [own.queue.desc, own.events.desc, own.page];
    return { own, table: own.table, pages, eventBuffers: own.events.size };
  },
  open(on, _, { own }) {
    const driver = new GuestDriver(on, own);
    return {
      dma: (endpoint, direct) => driver.dma(endpoint, direct),
      domains: driver.domains,
      pollFaults: () => driver.pollFaults(),
      setBypass: (bypass) =>
        new VirtioPciDriver(on.pciFunction, own.pci).configWrite(Config.fields.bypass.at, 1, Number(bypass)),
      restart(endpoint) {
        driver.deactivate();
        driver.reactivate(endpoint);
      },
    };
  },
};

const crosvm: FrontEnd<CrosvmPlaces> = {
  tellsWhy: false,
  serve: (o) => ({
    pci: new CrosvmFunction({ ...o, hostError: () => {} }),
    reportFaults: () => o.tracker.faults.serve(() => false), // it has no event queue
  }),
  activate(on, pages, cpus) {
    const own = CrosvmDriver.activate(on, pages, cpus).places;
    return { own, table: own.table, pages: own.lists, eventBuffers: 0 };
  },
  open: (on, cpu, { own }) => new CrosvmDriver(on, cpu, own),
};

export const FRONT_ENDS = { "virtio-iommu": virtioIommu, crosvm } as Record<
  "virtio-iommu" | "crosvm",
  FrontEnd
>;
