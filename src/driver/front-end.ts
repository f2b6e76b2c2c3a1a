import type { Bdf, Gpa } from "../base/units.ts";
import type { FrontEndName } from "../virtio/front-end.ts";
import { Config } from "../wire/virtio-iommu.ts";
import { CrosvmDriver, type CrosvmPlaces } from "./crosvm.ts";
import type { TrackedDma } from "./dma.ts";
import type { DmaApi, PageAllocator } from "./dma-api.ts";
import type { DomainRequests } from "./domain-requests.ts";
import type { TableUse } from "./survey.ts";
import type { TableGeometry } from "./table.ts";
import { type DriverCpu, type DriverPlaces, GuestDriver } from "./viommu.ts";
import { VirtioPciDriver } from "./virtio-pci.ts";

/** A guest driver on one CPU, whichever function it drives. */
export interface FrontEndDriver {
  dma(endpoint: Bdf, direct: DmaApi): TrackedDma;
  survey(): TableUse;
  /** Take the table up again: of a driver that can. */
  restart?(endpoint: Bdf): void;
  /** Of a driver that knows domains. */
  readonly domains?: DomainRequests;
  /** Take the device's fault reports: of a driver that gets some. */
  pollFaults?(): void;
  /** Whether functions in no domain reach guest memory: of a driver that knows domains. */
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

/** The driver of one of the PCI functions that the backend answers as. */
export interface FrontEndDrivers<Own = unknown> {
  /** Whether it learns why it was refused; otherwise it only sees that P is clear. */
  readonly tellsWhy: boolean;
  /** On CPU 0. */
  activate(on: DriverCpu, pages: PageAllocator, cpus: number): Places<Own>;
  open(on: DriverCpu, cpu: number, places: Places<Own>): FrontEndDriver;
}

const virtioIommu: FrontEndDrivers<DriverPlaces> = {
  tellsWhy: true,
  activate(on, allocator, cpus) {
    const own = GuestDriver.activate(on, allocator, cpus).places;
    const pages = [own.queue.desc, own.events.desc, own.page];
    return { own, table: own.table, pages, eventBuffers: own.events.size };
  },
  open(on, _, { own }) {
    const driver = new GuestDriver(on, own);
    return {
      dma: (endpoint, direct) => driver.dma(endpoint, direct),
      survey: () => driver.survey(),
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

const crosvm: FrontEndDrivers<CrosvmPlaces> = {
  tellsWhy: false,
  activate(on, pages, cpus) {
    const own = CrosvmDriver.activate(on, pages, cpus).places;
    return { own, table: own.table, pages: own.lists, eventBuffers: 0 };
  },
  open: (on, cpu, { own }) => new CrosvmDriver(on, cpu, own),
};

export const DRIVERS = { "virtio-iommu": virtioIommu, crosvm } as Record<FrontEndName, FrontEndDrivers>;
