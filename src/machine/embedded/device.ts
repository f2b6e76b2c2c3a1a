import type { Errno } from "../../base/errors.ts";
import { openStore, type StoreOptions } from "../../device/block-store.ts";
import { DEVICE_COUNTERS, type DeviceCounters } from "../../device/counters.ts";
import { Gpu, type GpuSetup } from "../../device/gpu.ts";
import { Nic, type NicSetup } from "../../device/nic.ts";
import { NvmeController, type NvmeQueueLayout } from "../../device/nvme.ts";
import { Bell } from "../../memory/bell.ts";
import { counters } from "../../memory/counters.ts";
import { GatedMemory } from "../../memory/gated-memory.ts";
import { type GuestAccess, GuestMemory } from "../../memory/guest-memory.ts";
import { DeviceGate } from "../../tracking/software-iommu.ts";
import { SECTOR_SIZE } from "../../wire/virtio-blk.ts";
import { CommandServer, type WorkerBase } from "../commands.ts";
import { DeviceRegisters } from "./doorbells.ts";
import { type GuestRam, ramRegions } from "./ram.ts";

/** Work done before the CPUs are told: as a device coalesces its interrupts. */
const BATCH = 32;
/** Work that the IOMMU has forbidden is tried again after this time, if nobody rings before. */
const RETRY_MS = 100;

export interface DiskSetup {
  readonly kind: "disk";
  readonly queue: number;
  readonly layout: NvmeQueueLayout;
}

/** What a driver tells the device, through the control thread, when its rings are there. */
export type DeviceSetup =
  | DiskSetup
  | { readonly kind: "nic"; readonly setup: NicSetup }
  | { readonly kind: "gpu"; readonly setup: GpuSetup };
export type DeviceKind = DeviceSetup["kind"];

export interface DeviceData {
  readonly kind: DeviceKind;
  /** Its place in the IOMMU's table. */
  readonly number: number;
  readonly ram: GuestRam;
  readonly iommu: SharedArrayBuffer;
  readonly counters: SharedArrayBuffer;
  readonly bell: SharedArrayBuffer;
  readonly backendBell: SharedArrayBuffer;
  /** Bells of the CPUs that use it: its interrupts. */
  readonly interrupts: readonly SharedArrayBuffer[];
  readonly doorbells: SharedArrayBuffer;
  readonly store: StoreOptions;
}

/** Answer to "stop": how often the host refused, by reason. */
export interface DeviceStopped {
  readonly hostErrors: readonly (readonly [Errno, number])[];
}

/** A device model behind its registers. */
interface Model {
  /** Bytes that it stores. */
  readonly size: number;
  readonly hostErrors?: ReadonlyMap<Errno, number>;
  start(setup: DeviceSetup): void;
  write(register: number, value: number): void;
  run(limit: number): { readonly completed: number };
  close?(): void;
}

/** As NVMe orders the registers of queue q: the submission queue's tail, the completion queue's head. */
export const submissionTail = (queue: number): number => 2 * queue;
export const completionHead = (queue: number): number => 2 * queue + 1;

export const NIC_RECEIVE = 0;
export const NIC_TRANSMIT = 1;
export const NIC_STOP = 2;
/** Written by the device. */
export const NIC_STOPPED = 3;

export const GPU_TAIL = 0;

interface ModelParts {
  readonly memory: GuestAccess;
  readonly counters: DeviceCounters;
  readonly registers: DeviceRegisters;
  readonly store: StoreOptions;
}

function disk({ memory, counters, store: options }: ModelParts): Model {
  const store = openStore(options);
  const controller = new NvmeController(memory, store, counters);
  return {
    size: store.sectors * SECTOR_SIZE,
    hostErrors: controller.hostErrors,
    start(setup) {
      if (setup.kind === "disk") controller.createQueue(setup.queue, setup.layout);
    },
    write(register, value) {
      const queue = register >> 1;
      if (register === submissionTail(queue)) controller.submit(queue, value);
      else controller.complete(queue, value);
    },
    run: (limit) => controller.run(limit),
    close: () => store.close(),
  };
}

function nic({ memory, counters, registers }: ModelParts): Model {
  const device = new Nic(memory, counters);
  return {
    size: 0,
    start(setup) {
      if (setup.kind === "nic") device.start(setup.setup);
    },
    write(register, value) {
      if (register === NIC_RECEIVE) device.receive(value);
      else if (register === NIC_TRANSMIT) device.transmit(value);
      else {
        device.stop();
        registers.set(NIC_STOPPED, 1);
      }
    },
    run: (limit) => device.run(limit),
  };
}

function gpu({ memory, counters }: ModelParts): Model {
  const device = new Gpu(memory, counters);
  return {
    size: 0,
    start(setup) {
      if (setup.kind === "gpu") device.start(setup.setup);
    },
    write: (_, tail) => device.submit(tail),
    run: (limit) => device.run(limit),
  };
}

const MODELS: Record<DeviceKind, (parts: ModelParts) => Model> = { disk, nic, gpu };

/** The thread of an assigned device: every DMA goes through the software IOMMU. */
export class DeviceThread {
  readonly #data: DeviceData;
  readonly #bell: Bell;
  readonly #interrupts: readonly Bell[];
  readonly #registers: DeviceRegisters;
  readonly #commands: CommandServer;
  #model: Model | undefined;
  #gate: DeviceGate | undefined;
  #stopping = false;

  constructor(data: DeviceData & WorkerBase) {
    this.#data = data;
    this.#bell = new Bell(data.bell);
    this.#interrupts = data.interrupts.map((buffer) => new Bell(buffer));
    this.#registers = new DeviceRegisters(data.doorbells);
    this.#commands = new CommandServer(data, {
      open: () => this.#open(),
      start: (setup: DeviceSetup) => this.#start(setup),
      stop: () => this.#stop(),
    });
  }

  run(): void {
    while (!this.#stopping) {
      const { rings } = this.#bell;
      this.#commands.serve();
      if (!this.#stopping && !this.#serve()) this.#bell.sleep(rings, RETRY_MS);
    }
  }

  /** Whether there was anything to do. */
  #serve(): boolean {
    const model = this.#model;
    if (!model) return false;
    this.#registers.changed((register, value) => model.write(register, value));
    const { completed } = model.run(BATCH);
    if (completed > 0) for (const interrupt of this.#interrupts) interrupt.ring();
    return completed > 0;
  }

  /** Returns how many bytes it stores. Throws UserError when the image cannot be used. */
  #open(): number {
    const { kind, number, ram, iommu, backendBell, store } = this.#data;
    const backend = new Bell(backendBell);
    this.#gate = new DeviceGate(iommu, number, () => backend.ring());
    const memory = new GatedMemory(new GuestMemory(ramRegions(ram)), this.#gate);
    this.#model = MODELS[kind]({
      ...{ memory, registers: this.#registers, store },
      counters: counters(DEVICE_COUNTERS, this.#data.counters),
    });
    return this.#model.size;
  }

  /** For the rest of the machine's life. */
  #start(setup: DeviceSetup): void {
    this.#gate!.setMastering(true);
    this.#model!.start(setup);
  }

  #stop(): DeviceStopped {
    this.#stopping = true;
    const hostErrors = [...(this.#model?.hostErrors ?? [])];
    this.#model?.close?.();
    return { hostErrors };
  }
}
