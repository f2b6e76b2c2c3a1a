import { setTimeout as sleep } from "node:timers/promises";
import { UserError } from "../base/errors.ts";
import { FRAME_SIZE } from "../base/units.ts";
import { DEVICE_COUNTERS, type DeviceCounters } from "../device/counters.ts";
import { monotonicClock } from "../host/clock.ts";
import { EventFd } from "../host/eventfd.ts";
import { closeFd } from "../host/libc.ts";
import { socketPair } from "../host/socket.ts";
import { type WorkerEvent, WorkerHost, workerEntry } from "../machine/commands.ts";
import type { Guest } from "../machine/qemu/guest.ts";
import { type Qemu, type QemuDevice, startQemu } from "../machine/qemu/qemu.ts";
import { counters, countersBuffer } from "../memory/counters.ts";
import { createIommuBuffer } from "../tracking/software-iommu.ts";
import { TRACKING_COUNTERS, type TrackingCounters } from "../tracking/tracker.ts";
import type { BackendData } from "./backend.ts";
import { DISK_BDF, DISK_SLOT, type DiskData, type DiskStopped } from "./disk.ts";
import {
  countersAfterOneSecond,
  loadDrivers,
  type ModuleCounters,
  readCounters,
  unbindDisk,
} from "./guest-side.ts";
import type { Started, Stopped } from "./host-side.ts";
import type { Booted, DriverState, Machine, MachineEnd, MachineOptions, Worked } from "./machine.ts";
import { describeHost, type RunResult } from "./result.ts";
import { runWorkload, type Workload } from "./workload.ts";

/** Our virtio-iommu comes before what it tracks, so that its driver is active when theirs bind. */
const IOMMU_SLOT = 3;
/** RAM above the PCI hole starts at 4 GiB, so GFNs reach at most this far beyond the RAM's size. */
const PCI_HOLE_FRAMES = 2 ** 32 / FRAME_SIZE;

export interface VmOptions extends MachineOptions {
  readonly guest: Guest;
  readonly accel: "auto" | "tcg" | "kvm";
  /** The guest's console is this process's terminal. */
  readonly shell?: boolean;
  /** More words for the guest kernel's command line. */
  readonly append?: readonly string[];
}

const USERSPACE_MS = 90_000;

/**
 * A QEMU with our virtio-iommu and our assigned disk, the threads that serve them, and what they count. Started with
 * the guest paused: `resume()` lets it run.
 */
export class Vm implements Machine {
  readonly name = "qemu";
  readonly host: RunResult["host"];
  readonly qemu: Qemu;
  readonly pins: TrackingCounters;
  readonly disk: DeviceCounters;
  readonly devices: readonly DeviceCounters[];
  readonly started: Started;
  readonly failed: Promise<never>;
  readonly #options: VmOptions;
  readonly #parts: Parts;
  #closing: Promise<MachineEnd> | undefined;

  private constructor(qemu: Qemu, started: Started, parts: Parts, options: VmOptions) {
    this.host = describeHost(qemu.version, qemu.accel);
    this.qemu = qemu;
    this.started = started;
    this.#options = options;
    this.#parts = parts;
    this.pins = parts.pins;
    this.disk = parts.disk;
    this.devices = [parts.disk];
    this.failed = parts.failed.promise;
  }

  /** Throws UserError when a part cannot start; then nothing is left behind. */
  static async start(options: VmOptions): Promise<Vm> {
    const parts = new Parts(options);
    let qemu: Qemu | undefined;
    try {
      await parts.diskWorker.request("open");
      qemu = await startQemu({
        kernel: options.guest.kernel,
        initrd: options.guest.initrd,
        memoryMiB: options.memoryMiB,
        cpus: options.cpus,
        accel: options.accel,
        devices: parts.takeDevices(),
        ...(options.append && { append: options.append }),
        ...(options.shell && { shell: true }),
      });
      return new Vm(qemu, await parts.started(options.memoryMiB), parts, options);
    } catch (error) {
      await qemu?.close();
      await parts.close().catch(() => {});
      throw error;
    }
  }

  resume(): Promise<void> {
    return this.qemu.resume();
  }

  async boot(): Promise<Booted> {
    const kernel = await this.qemu.agent.hello(USERSPACE_MS);
    const userspaceAt = monotonicClock.now();
    await loadDrivers(this.qemu.agent, this.#options.guest, this.#options.strategy);
    return { kernel, userspaceAt };
  }

  async work(workload: Workload): Promise<Worked> {
    const { agent } = this.qemu;
    const [done, first] = await Promise.all([runWorkload(agent, workload), countersAfterOneSecond(agent)]);
    if (!this.#tracked) return { workload: done, first: null, last: null };
    return { workload: done, first: stateOf(first), last: stateOf(await readCounters(agent)) };
  }

  async shutDown(): Promise<(DriverState & { live: number }) | null> {
    const { agent } = this.qemu;
    await unbindDisk(agent);
    if (!this.#tracked) return null;
    const counters = await readCounters(agent);
    return { ...stateOf(counters), live: counters.live_refs ?? 0 };
  }

  /** End QEMU and the threads; idempotent. */
  close(): Promise<MachineEnd> {
    this.#closing ??= (async () => {
      await this.qemu.close();
      return await this.#parts.close();
    })();
    return this.#closing;
  }

  get #tracked(): boolean {
    return this.#options.strategy === "coiommu";
  }
}

const stateOf = (counters: ModuleCounters): DriverState => ({
  map: counters.map ?? 0,
  unmap: counters.unmap ?? 0,
  framesMapped: counters.frames_mapped ?? 0,
  framesUnmapped: counters.frames_unmapped ?? 0,
  pinRequests: counters.pin_requests ?? 0,
});

/** Threads, shared memory and sockets of one VM, from before QEMU starts until after it has ended. */
class Parts {
  readonly pins: TrackingCounters;
  readonly disk: DeviceCounters;
  readonly backendWorker: WorkerHost;
  readonly diskWorker: WorkerHost;
  readonly failed = Promise.withResolvers<never>();
  readonly #touch = EventFd.create();
  #devices: QemuDevice[];
  #closing = false;

  constructor(options: VmOptions) {
    const [iommuFd, qemuIommuFd] = socketPair();
    const [diskFd, qemuDiskFd] = socketPair();
    this.#devices = [
      {
        fds: [qemuIommuFd],
        arguments: ([fd]) => ["-device", `x-pci-proxy-dev,id=coiommu,fd=${fd},addr=${IOMMU_SLOT}`],
      },
      {
        fds: [qemuDiskFd],
        arguments: ([fd]) => [
          ...["-chardev", `socket,id=disk,fd=${fd}`],
          "-device",
          `vhost-user-blk-pci,chardev=disk,num-queues=1,queue-size=256,iommu_platform=on,disable-legacy=on,addr=${DISK_SLOT}`,
        ],
      },
    ];
    const iommu = createIommuBuffer((options.memoryMiB * 2 ** 20) / FRAME_SIZE + PCI_HOLE_FRAMES);
    const pins = countersBuffer(TRACKING_COUNTERS);
    const disk = countersBuffer(DEVICE_COUNTERS);
    this.pins = counters(TRACKING_COUNTERS, pins);
    this.disk = counters(DEVICE_COUNTERS, disk);
    const { strategy, pinner, policy, interval, quota } = options;
    const touchFd = this.#touch.fd;
    const onEvent = (event: WorkerEvent) => this.#hear(event, options.onWarning ?? (() => {}));
    const wake = EventFd.create();
    this.backendWorker = new WorkerHost({
      name: "the backend",
      entry: options.backendEntry ?? workerEntry(import.meta.url, "./backend-worker"),
      data: {
        ...{ wakeFd: wake.fd, socketFd: iommuFd, touchFd, iommu, counters: pins, assigned: [DISK_BDF] },
        ...{ strategy, pinner, policy, interval, quota, firmware: true },
      } satisfies BackendData,
      wake,
      onEvent,
    });
    const diskWake = EventFd.create();
    this.diskWorker = new WorkerHost({
      name: "the disk",
      entry: options.deviceEntry ?? workerEntry(import.meta.url, "./disk-worker"),
      data: {
        ...{ wakeFd: diskWake.fd, socketFd: diskFd, touchFd, iommu, counters: disk, disk: options.disk },
      } satisfies DiskData,
      wake: diskWake,
      onEvent,
    });
    this.failed.promise.catch(() => {});
    for (const worker of [this.backendWorker, this.diskWorker])
      void worker.ended.then((error) => {
        if (error) this.failed.reject(error);
      });
  }

  /** QEMU's ends of the sockets go with the devices. */
  takeDevices(): QemuDevice[] {
    const devices = this.#devices;
    this.#devices = [];
    return devices;
  }

  /** What stands before the guest starts. QEMU has sent its memory map by now, but it may still be on its way. */
  async started(memoryMiB: number): Promise<Started> {
    // Not all RAM is in the map: the legacy hole below 1 MiB, and what firmware keeps from the guest.
    const enough = 0.9 * memoryMiB * 2 ** 20;
    let started = await this.backendWorker.request<Started>("started");
    for (let tries = 0; started.ramBytes < enough && tries < 100; tries++) {
      await sleep(10);
      started = await this.backendWorker.request<Started>("started");
    }
    if (started.ramBytes >= enough) return started;
    throw new UserError(`QEMU shares ${started.ramBytes} bytes of RAM, not ${memoryMiB} MiB`, 1);
  }

  /** Stop the threads: the disk first, because its DMA relies on the pins. */
  async close(): Promise<MachineEnd> {
    this.#closing = true;
    for (const { fds } of this.#devices) fds.forEach(closeFd);
    this.#devices = [];
    const disk = this.diskWorker.stop<DiskStopped>();
    await Promise.allSettled([disk]);
    const backend = this.backendWorker.stop<Stopped>();
    await Promise.allSettled([backend]);
    this.#touch.close();
    return { backend: await backend, hostErrors: (await disk).hostErrors };
  }

  #hear({ kind, message }: WorkerEvent, warn: (text: string) => void): void {
    if (this.#closing || kind === "peer-gone") return; // QEMU's end is told by QEMU's exit
    if (kind === "warning") warn(message);
    else this.failed.reject(new UserError(message, 1));
  }
}
