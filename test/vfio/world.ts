/**
 * A guest in one thread, and its host: the production tracker with pins of VFIO, and the guest driver in TypeScript with
 * its NVMe driver on the real function. Runs inside the proof machine.
 */
import {
  type Bdf,
  FRAME_SIZE,
  type Gfn,
  type Gpa,
  milliseconds,
  type Nanoseconds,
  parseBdf,
} from "../../src/base/units.ts";
import { DRIVER_COUNTERS } from "../../src/driver/counters.ts";
import type { Cpu } from "../../src/driver/cpu.ts";
import { DirectDma } from "../../src/driver/dma.ts";
import type { DmaApi } from "../../src/driver/dma-api.ts";
import { NvmeQueue, type NvmeRequest } from "../../src/driver/nvme.ts";
import { NvmeController, nvmePort } from "../../src/driver/nvme-controller.ts";
import { NvmeRings } from "../../src/driver/nvme-rings.ts";
import { FramePool } from "../../src/driver/pages.ts";
import { GuestDriver } from "../../src/driver/viommu.ts";
import { monotonicClock } from "../../src/host/clock.ts";
import { type Ioctl, ioctl } from "../../src/host/ioctl.ts";
import { SharedMapping } from "../../src/host/mapping.ts";
import { PresentMappings } from "../../src/host/present-mappings.ts";
import { VfioDevice } from "../../src/host/vfio-device.ts";
import { VfioPinner } from "../../src/host/vfio-pinner.ts";
import { counters, countersBuffer } from "../../src/memory/counters.ts";
import { GuestMemory } from "../../src/memory/guest-memory.ts";
import { MmioRegisters } from "../../src/memory/mmio.ts";
import { createPolicy } from "../../src/policy/registry.ts";
import { createIommuBuffer, SoftwareIommu } from "../../src/tracking/software-iommu.ts";
import { TRACKING_COUNTERS, Tracker, type TrackerOptions } from "../../src/tracking/tracker.ts";
import { VirtioIommu } from "../../src/virtio/iommu.ts";
import { VirtioPciFunction } from "../../src/virtio/pci.ts";
import { NVME_CMD_READ, NVME_CMD_WRITE, NvmeCommand } from "../../src/wire/nvme.ts";
import { FakeClock } from "../support/clock.ts";
import { MappedFrames } from "./recording.ts";

const REGION_FRAMES = 4096;
const HIGH = 2 ** 32 / FRAME_SIZE;
/** For the driver: table, queues, PRP lists. */
const POOL_FRAMES = 512;
const QUEUE_ENTRIES = 16;
const COMPLETION_LIMIT = milliseconds(10_000);

/** First frames of two runs of memory that tests use as they like, and their length: one below, one above 4 GiB. */
export const DATA = [POOL_FRAMES, HIGH] as const;
export const DATA_FRAMES = REGION_FRAMES - POOL_FRAMES;

export const dataFrame = (index: number): number =>
  index < DATA_FRAMES ? DATA[0] + index : DATA[1] + index - DATA_FRAMES;
export const isData = (gfn: number): boolean =>
  DATA.some((first) => gfn >= first && gfn < first + DATA_FRAMES);

const spinning: Cpu = {
  waitFor(done, timeout) {
    const deadline = monotonicClock.now() + timeout;
    while (!done()) if (monotonicClock.now() > deadline) return done();
    return true;
  },
};

export interface WorldOptions {
  readonly bdf: string;
  readonly strategy?: "coiommu" | "static";
  /** What broken twins replace. */
  readonly kernel?: Ioctl;
  readonly openTable?: NonNullable<TrackerOptions["openTable"]>;
}

export class World {
  readonly mapped = new MappedFrames();
  readonly clock = new FakeClock();
  readonly memory: GuestMemory;
  readonly pinner: VfioPinner;
  readonly tracker: Tracker;
  readonly counters = counters(TRACKING_COUNTERS, countersBuffer(TRACKING_COUNTERS));
  readonly dma: DmaApi;
  readonly #device: VfioDevice;
  readonly #ram = new SharedMapping(2 * REGION_FRAMES * FRAME_SIZE);
  readonly #present = new PresentMappings((reason) => {
    throw new Error(reason);
  });
  readonly #controller: NvmeController;
  readonly #queue: NvmeQueue;
  /** A queue whose commands name any address. */
  readonly #raw: NvmeRings;

  constructor({ bdf, strategy = "coiommu", kernel = ioctl, openTable }: WorldOptions) {
    this.#device = VfioDevice.open(bdf);
    const { container } = this.#device;
    this.pinner = new VfioPinner({ container, ioctl: this.mapped.recording(kernel) });
    this.memory = new GuestMemory();
    this.tracker = new Tracker({
      ...{ memory: this.memory, pinner: this.pinner, clock: this.clock, counters: this.counters },
      iommu: new SoftwareIommu(createIommuBuffer(HIGH + REGION_FRAMES), this.clock),
      policy: createPolicy("lru"),
      quota: Number.POSITIVE_INFINITY,
      beforeActivation: "none",
      wholeRam: strategy === "static",
      ...(openTable && { openTable }),
    });
    this.tracker.setMemory(this.#regions());
    const pages = new FramePool(this.memory, 0 as Gfn, POOL_FRAMES);
    const direct = new DirectDma(pages);
    const endpoint = parseBdf(bdf)!;
    this.dma = strategy === "static" ? direct : this.#driver(endpoint, pages).dma(endpoint, direct);
    const bar = SharedMapping.bytes(this.#device.function.mapBar(0));
    const registers = new MmioRegisters(bar);
    this.#device.function.startDma();
    const parts = { memory: this.memory, dma: this.dma };
    this.#controller = new NvmeController({ ...parts, registers, cpu: spinning }, 2);
    const port = nvmePort(registers, this.#controller.identity.doorbellStride);
    this.#queue = new NvmeQueue({ ...parts, port, id: 1, size: QUEUE_ENTRIES });
    this.#raw = new NvmeRings({ ...parts, port, id: 2, size: QUEUE_ENTRIES });
    this.#controller.createQueue(1, this.#queue.rings);
    this.#controller.createQueue(2, this.#raw);
  }

  #regions() {
    const bytes = SharedMapping.bytes(this.#ram);
    const size = REGION_FRAMES * FRAME_SIZE;
    const presentAddress = this.#present.of(this.#ram.address, this.#ram.size)!;
    return [0, HIGH].map((gfn, i) => ({
      gpa: (gfn * FRAME_SIZE) as Gpa,
      size,
      hostAddress: this.#ram.address + i * size,
      presentAddress: presentAddress + i * size,
      bytes: bytes.subarray(i * size, (i + 1) * size),
    }));
  }

  #driver(endpoint: Bdf, pages: FramePool): GuestDriver {
    const device = new VirtioIommu({
      ...{ memory: this.memory, tracker: this.tracker, pinPage: true },
      assigned: new Map([[endpoint, undefined]]),
      hostError: (error) => {
        throw error;
      },
    });
    const on = {
      memory: this.memory,
      pciFunction: new VirtioPciFunction(device, this.memory),
      cpu: spinning,
      counters: counters(DRIVER_COUNTERS, countersBuffer(DRIVER_COUNTERS)),
    };
    return GuestDriver.activate(on, pages, 1);
  }

  /** Do a request as a driver does: map, DMA, unmap. Returns its NVMe status. */
  request(request: Omit<NvmeRequest, "done">): number {
    return this.#completed((done) => {
      this.#queue.submit({ ...request, done });
      return () => this.#queue.poll();
    });
  }

  /** Have the function read or write memory, mapped for it or not, at the addresses of up to two pages. */
  dmaTo(kind: "read" | "write", block: number, blocks: number, prp1: number, prp2 = 0): number {
    const opcode = kind === "read" ? NVME_CMD_READ : NVME_CMD_WRITE;
    return this.#completed((done) => {
      this.#raw.put(NvmeCommand.encode({ opcode, nsid: 1, prp1, prp2, slba: block, nlb: blocks - 1 }));
      this.#raw.tell();
      return () => this.#raw.poll(({ status }) => done(status));
    });
  }

  #completed(start: (done: (status: number) => void) => () => void): number {
    let status: number | undefined;
    const poll = start((answer) => {
      status = answer;
    });
    const over = () => {
      poll();
      return status !== undefined;
    };
    if (!spinning.waitFor(over, COMPLETION_LIMIT))
      throw new Error("the NVMe function does not complete a command");
    return status!;
  }

  /** A whole unpin pass, a second later. */
  pass(): void {
    this.clock.time = (this.clock.now() + 1e9) as Nanoseconds;
    this.tracker.startPass();
    while (this.tracker.slice());
  }

  /** In order; a program that fails ends without. */
  close(): void {
    this.#controller.deleteQueue(1);
    this.#controller.deleteQueue(2);
    this.#queue.close();
    this.#raw.free();
    this.#controller.shutDown();
    this.#device.function.stopDma();
    this.pinner.close();
    this.#present.close();
    this.#device.close();
  }
}
