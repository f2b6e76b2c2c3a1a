import { setTimeout as sleep } from "node:timers/promises";
import { invariant, UserError } from "../base/errors.ts";
import { FRAME_SIZE } from "../base/units.ts";
import { DEVICE_COUNTERS, type DeviceCounters } from "../device/counters.ts";
import { DRIVER_COUNTERS, type DriverCounters } from "../driver/counters.ts";
import type { Places } from "../driver/front-end.ts";
import { monotonicClock } from "../host/clock.ts";
import { type WorkerEvent, WorkerHost, workerEntry } from "../machine/commands.ts";
import type { Attach, CpuData, DriverMode } from "../machine/embedded/cpu.ts";
import type { DeviceData, DeviceSetup, DeviceStopped } from "../machine/embedded/device.ts";
import { doorbellsBuffer } from "../machine/embedded/doorbells.ts";
import type { DeviceLink, LoadSpec } from "../machine/embedded/load.ts";
import { type GuestRam, OwnedRam, ramEnd } from "../machine/embedded/ram.ts";
import { type Measurement, report } from "../machine/embedded/workloads/workload.ts";
import { Bell } from "../memory/bell.ts";
import { counters, countersBuffer, sums } from "../memory/counters.ts";
import { createIommuBuffer } from "../tracking/software-iommu.ts";
import { TRACKING_COUNTERS, type TrackingCounters } from "../tracking/tracker.ts";
import { mailboxBuffer } from "../transport/mailbox.ts";
import { whenPinned } from "./background.ts";
import { DirtyFrames } from "./dirty.ts";
import type { EmbeddedBackendData } from "./embedded-backend.ts";
import { type DevicePlan, type EmbeddedOptions, planDevices, planLoads } from "./embedded-plan.ts";
import type { Started, Stopped } from "./host-side.ts";
import type { AssignedDevice, Booted, DriverState, Machine, MachineEnd, Worked } from "./machine.ts";
import { Operator } from "./operator.ts";
import { RealDisk } from "./real-disk.ts";
import { describeHost } from "./result.ts";
import { hasDriver } from "./strategy.ts";
import { describeWorkload, NO_FIGURES, type Workload } from "./workload.ts";

const CPU_WORKER = workerEntry(import.meta.url, "../machine/embedded/cpu-worker");
const DEVICE_WORKER = workerEntry(import.meta.url, "../machine/embedded/device-worker");

/**
 * A guest without a VM: its CPUs, its assigned devices and the backend are threads of this process that share its RAM.
 * The same functions, tracker and table as behind QEMU, and the same driver as Linux has, in TypeScript.
 */
export class EmbeddedMachine implements Machine {
  readonly name = "embedded";
  readonly host = describeHost(null, null);
  readonly started: Started;
  readonly pins: TrackingCounters;
  readonly iommuTable: SharedArrayBuffer;
  readonly devices: readonly DeviceCounters[];
  readonly assigned: readonly AssignedDevice[];
  readonly disks = null;
  readonly drivers: readonly DriverCounters[] | null;
  readonly operator: Operator;
  readonly dirty: DirtyFrames;
  readonly balloon = null;
  readonly ram: GuestRam;
  readonly failed: Promise<never>;
  readonly #threads: Threads;
  readonly #options: EmbeddedOptions;
  /** Of models; a real disk says what it is when the guest has booted. */
  readonly #loads: readonly (LoadSpec | undefined)[] | undefined;
  #closing: Promise<MachineEnd> | undefined;

  private constructor(
    threads: Threads,
    options: EmbeddedOptions,
    loads: readonly (LoadSpec | undefined)[] | undefined,
    started: Started,
  ) {
    this.#threads = threads;
    this.#options = options;
    this.#loads = loads;
    this.started = started;
    this.pins = threads.pins;
    this.iommuTable = threads.iommu;
    this.devices = threads.deviceCounters;
    this.assigned = planDevices(options).map(({ endpoint }, i) => ({
      ...{ bdf: endpoint, counters: this.devices[i] ?? null },
    }));
    this.drivers = threads.driver ? threads.driverCounters : null;
    this.operator = new Operator(threads.backend, options);
    this.dirty = new DirtyFrames(threads.backend);
    this.ram = threads.ram.ram;
    this.failed = threads.failed.promise;
  }

  /** Throws UserError when a part cannot start; then nothing is left behind. */
  static async start(options: EmbeddedOptions): Promise<EmbeddedMachine> {
    const threads = new Threads(options);
    try {
      const [diskBytes] = await Promise.all(threads.devices.map((d) => d.request<number>("open")));
      const loads = diskBytes === undefined ? undefined : planLoads(options, diskBytes);
      const ask = () => threads.backend.request<Started>("started");
      const started = await whenPinned(threads.pins, ask, options.onProgress);
      return new EmbeddedMachine(threads, options, loads, started);
    } catch (error) {
      await threads.close().catch(() => {});
      throw error;
    }
  }

  async resume(): Promise<void> {
    await this.#onCpus("reset");
  }

  async boot(): Promise<Booted> {
    const { cpus, driver } = this.#threads;
    const places = driver ? await cpus[0]!.request<Places>("activate") : null;
    const loads = this.#loads ?? (await this.#startDisk(places));
    const setups = await this.#onCpus<DeviceSetup | null>(
      "attach",
      (cpu): Attach => ({ places, load: loads[cpu] }),
    );
    await this.#threads.startDevices(setups);
    return { kernel: null, userspaceAt: monotonicClock.now() };
  }

  async work(workload: Workload): Promise<Worked> {
    const [measurements, first] = await Promise.all([
      this.#work(),
      sleep(1000).then(() => this.#driverState()),
    ]);
    const parts = measurements.filter((m) => m !== null);
    const figures = workload.name === "idle" ? NO_FIGURES : report(parts);
    return { workload: { ...describeWorkload(workload), ...figures }, first, last: this.#driverState() };
  }

  /** The drivers unmap all buffers at the end of their work; then also their rings. */
  async #work(): Promise<(Measurement | null)[]> {
    const measurements = await this.#onCpus<Measurement | null>("work");
    const { disk, cpus } = this.#threads;
    await disk?.stop(cpus[0]!);
    await this.#onCpus("release");
    return measurements;
  }

  async #startDisk(places: Places | null): Promise<(LoadSpec | undefined)[]> {
    const { disk, cpus } = this.#threads;
    const identity = await disk!.start(cpus[0]!, places);
    return planLoads(this.#options, identity.size, identity);
  }

  /** The drivers have unmapped all at the end of their work. */
  async shutDown(): Promise<(DriverState & { live: number }) | null> {
    const state = this.#driverState();
    if (!state) return null;
    const live = await this.#onCpus<number>("live");
    return { ...state, live: live.reduce((sum, n) => sum + n) };
  }

  close(): Promise<MachineEnd> {
    this.#closing ??= this.#threads.close();
    return this.#closing;
  }

  #onCpus<T>(command: string, argument: (cpu: number) => unknown = () => null): Promise<T[]> {
    return Promise.all(this.#threads.cpus.map((cpu, i) => cpu.request<T>(command, argument(i))));
  }

  #driverState(): DriverState | null {
    const { driver, driverCounters } = this.#threads;
    if (!driver) return null;
    const { kicks: exits, ...state } = sums(STATE, driverCounters);
    return { ...state, exits };
  }
}

const STATE = [
  ...(["map", "unmap", "framesMapped", "framesUnmapped"] as const),
  ...(["pinRequests", "mapRequests", "unmapRequests", "kicks"] as const),
] as const;

function openDisk({ device, pinner, memoryMiB }: EmbeddedOptions): RealDisk | undefined {
  if (!device) return undefined;
  invariant(pinner === "vfio" || pinner === "iommufd", "a real device needs the pinner of its IOMMU");
  return new RealDisk(device, pinner, memoryMiB);
}

/** The threads of one guest, and the memory that they share. */
class Threads {
  readonly driver: DriverMode | null;
  readonly pins: TrackingCounters;
  readonly deviceCounters: readonly DeviceCounters[];
  readonly driverCounters: readonly DriverCounters[];
  readonly backend: WorkerHost;
  readonly devices: readonly WorkerHost[];
  readonly cpus: readonly WorkerHost[];
  readonly failed = Promise.withResolvers<never>();
  readonly #options: EmbeddedOptions;
  readonly #plan: readonly DevicePlan[];
  /** Instead of a device thread. */
  readonly disk: RealDisk | undefined;
  readonly ram: OwnedRam;
  readonly iommu: SharedArrayBuffer;
  readonly #mailbox: SharedArrayBuffer;
  readonly #backendBell = Bell.buffer();
  readonly #cpuBells: readonly SharedArrayBuffer[];
  readonly #models: readonly { readonly bell: SharedArrayBuffer; readonly doorbells: SharedArrayBuffer }[];
  readonly #links: readonly DeviceLink[];
  #closing = false;

  constructor(options: EmbeddedOptions) {
    this.#options = options;
    this.driver = hasDriver(options.strategy) ? options.strategy : null;
    this.#plan = planDevices(options);
    this.disk = openDisk(options);
    try {
      this.ram = new OwnedRam(options.memoryMiB, options.pinner !== "software", this.disk?.hole);
    } catch (error) {
      this.disk?.close();
      throw error;
    }
    this.iommu = createIommuBuffer(ramEnd(this.ram.ram) / FRAME_SIZE);
    this.#mailbox = mailboxBuffer(options.cpus);
    this.#cpuBells = Array.from({ length: options.cpus }, () => Bell.buffer());
    const models = this.disk ? [] : this.#plan;
    this.#models = models.map(() => ({
      bell: Bell.buffer(),
      doorbells: doorbellsBuffer(2 * (options.cpus + 1)),
    }));
    this.#links = this.#plan.map(({ endpoint }, i) => ({
      endpoint,
      ...(this.disk ? { bar: this.disk.bar } : this.#models[i]!),
    }));
    const pins = countersBuffer(TRACKING_COUNTERS);
    const ofDevices = models.map(() => countersBuffer(DEVICE_COUNTERS));
    const ofDrivers = this.#cpuBells.map(() => countersBuffer(DRIVER_COUNTERS));
    this.pins = counters(TRACKING_COUNTERS, pins);
    this.deviceCounters = ofDevices.map((buffer) => counters(DEVICE_COUNTERS, buffer));
    this.driverCounters = ofDrivers.map((buffer) => counters(DRIVER_COUNTERS, buffer));
    this.failed.promise.catch(() => {});
    this.backend = this.#startBackend(pins);
    this.devices = ofDevices.map((buffer, number) => this.#startDevice(number, buffer));
    this.cpus = ofDrivers.map((buffer, number) => this.#startCpu(number, buffer));
  }

  /** With what each CPU's driver has set up. */
  async startDevices(setups: readonly (DeviceSetup | null)[]): Promise<void> {
    for (const [cpu, setup] of setups.entries())
      if (setup && this.disk) await this.disk.createQueue(this.cpus[0]!, setup);
      else if (setup) await this.devices[this.#deviceOf(cpu)]!.request("start", setup);
  }

  /** The CPUs first, then the devices, because their DMA relies on the pins. */
  async close(): Promise<MachineEnd> {
    this.#closing = true;
    await Promise.all(this.cpus.map((cpu) => cpu.terminate()));
    const [disk] = await Promise.allSettled([(async () => this.disk?.stopDma())()]);
    const devices = await Promise.allSettled(this.devices.map((device) => device.stop<DeviceStopped>()));
    const [backend] = await Promise.allSettled([this.backend.stop<Stopped>()]);
    this.ram.close();
    this.disk?.close();
    if (backend.status === "rejected") throw backend.reason;
    if (disk.status === "rejected") throw disk.reason;
    const hostErrors = devices.flatMap((d) => (d.status === "fulfilled" ? d.value.hostErrors : []));
    return { backend: backend.value, hostErrors };
  }

  #startBackend(pins: SharedArrayBuffer): WorkerHost {
    const { strategy, policy, interval, speculate = "off", quota, pinner, recording } = this.#options;
    const { beforeActivation, activationTimeout, frontEnd = "virtio-iommu" } = this.#options;
    const { faultCapable = false, backendEntry } = this.#options;
    const data = {
      ...{ ram: this.ram.ram, iommu: this.iommu, mailbox: this.#mailbox, bell: this.#backendBell },
      ...{
        counters: pins,
        assigned: this.#plan.map(({ endpoint: bdf }, gate) =>
          this.disk ? { bdf } : { bdf, gate, faultCapable },
        ),
      },
      ...{ strategy, policy, interval, speculate, quota, pinner, beforeActivation, activationTimeout },
      ...{ frontEnd, qemu: false, recordingSince: recording?.began ?? null, space: this.disk?.space },
    } satisfies EmbeddedBackendData;
    const entry = backendEntry ?? workerEntry(import.meta.url, "./embedded-backend-worker");
    return this.#worker("the backend", entry, data, this.#backendBell);
  }

  #startDevice(number: number, ofDevice: SharedArrayBuffer): WorkerHost {
    const { kind, cpus } = this.#plan[number]!;
    const { bell, doorbells } = this.#models[number]!;
    const data = {
      ...{ kind, number, ram: this.ram.ram, iommu: this.iommu, counters: ofDevice, bell, doorbells },
      ...{ backendBell: this.#backendBell, interrupts: cpus.map((cpu) => this.#cpuBells[cpu]!) },
      store: this.#options.disk,
    } satisfies DeviceData;
    return this.#worker(`the ${kind}`, this.#options.deviceEntry ?? DEVICE_WORKER, data, bell);
  }

  #startCpu(number: number, ofDriver: SharedArrayBuffer): WorkerHost {
    const { cpus, faultCapable = false, frontEnd = "virtio-iommu", recording } = this.#options;
    const bell = this.#cpuBells[number]!;
    const link = this.#links[this.#deviceOf(number)];
    const data = {
      ...{
        number,
        cpus,
        link,
        ram: this.ram.ram,
        driver: this.driver,
        frontEnd,
        mailbox: this.#mailbox,
        bell,
      },
      ...{ backendBell: this.#backendBell, counters: ofDriver, faultCapable },
      recordingSince: recording?.began ?? null,
    } satisfies CpuData;
    return this.#worker(`CPU ${number}`, this.#options.cpuEntry ?? CPU_WORKER, data, bell);
  }

  /** -1 for none. */
  #deviceOf(cpu: number): number {
    return this.#plan.findIndex((device) => device.cpus.includes(cpu));
  }

  #worker(name: string, entry: URL, data: object, bellBuffer: SharedArrayBuffer): WorkerHost {
    const bell = new Bell(bellBuffer);
    const wake = { signal: () => bell.ring(), close: () => {} };
    const worker = new WorkerHost({ name, entry, data, wake, onEvent: (event) => this.#hear(event) });
    void worker.ended.then((error) => {
      if (error) this.failed.reject(error);
    });
    return worker;
  }

  #hear({ kind, message }: WorkerEvent): void {
    if (kind === "log") this.#options.recording?.write(message);
    else if (this.#closing) return;
    else if (kind === "warning") this.#options.onWarning?.(message);
    else this.failed.reject(new UserError(message, 1));
  }
}
