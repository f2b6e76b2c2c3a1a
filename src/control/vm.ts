import { setTimeout as sleep } from "node:timers/promises";
import { UserError } from "../base/errors.ts";
import { type Bdf, FRAME_SIZE, type Nanoseconds, parseBdf } from "../base/units.ts";
import { DEVICE_COUNTERS, type DeviceCounters } from "../device/counters.ts";
import { EventFd } from "../host/eventfd.ts";
import { closeFd } from "../host/libc.ts";
import { socketPair } from "../host/socket.ts";
import type { Guest } from "../machine/qemu/guest.ts";
import { type Qemu, type QemuDevice, startQemu } from "../machine/qemu/qemu.ts";
import { counters, countersBuffer } from "../memory/counters.ts";
import { createIommuBuffer } from "../tracking/software-iommu.ts";
import { TRACKING_COUNTERS, type TrackingCounters } from "../tracking/tracker.ts";
import type { BackendData, PinnerName, Started, Stopped, Strategy } from "./backend.ts";
import { type WorkerEvent, WorkerHost } from "./commands.ts";
import type { DiskData, DiskOptions, DiskStopped } from "./disk.ts";

/** Our virtio-iommu comes before what it tracks, so that its driver is active when theirs bind. */
const IOMMU_SLOT = 3;
const DISK_SLOT = 4;
export const DISK_BDF = parseBdf("00:04.0") as Bdf;
/** RAM above the PCI hole starts at 4 GiB, so GFNs reach at most this far beyond the RAM's size. */
const PCI_HOLE_FRAMES = 2 ** 32 / FRAME_SIZE;

export interface VmOptions {
  readonly guest: Guest;
  readonly memoryMiB: number;
  readonly cpus: number;
  readonly accel: "auto" | "tcg" | "kvm";
  readonly strategy: Strategy;
  readonly policy: string;
  readonly interval: Nanoseconds;
  readonly quota: number;
  readonly pinner: PinnerName;
  readonly disk: DiskOptions;
  /** The guest's console is this process's terminal. */
  readonly shell?: boolean;
  /** More words for the guest kernel's command line. */
  readonly append?: readonly string[];
  readonly onWarning?: (text: string) => void;
  /** The backend's entry; tests of the checkers put a broken one here. */
  readonly backendEntry?: URL;
}

/** What was left when everything had ended. */
export interface VmEnd {
  readonly backend: Stopped;
  readonly disk: DiskStopped;
}

/** This module's neighbour, as source or as built. */
const entry = (name: string) =>
  new URL(`./${name}${import.meta.url.endsWith(".ts") ? ".ts" : ".js"}`, import.meta.url);

/**
 * A QEMU with our virtio-iommu and our assigned disk, the threads that serve them, and what they count. Started with
 * the guest paused: `resume()` lets it run.
 */
export class Vm {
  readonly qemu: Qemu;
  readonly pins: TrackingCounters;
  readonly disk: DeviceCounters;
  readonly started: Started;
  /** Rejects when a part of the VM fails that should run until close(). */
  readonly failed: Promise<never>;
  readonly #parts: Parts;
  #closing: Promise<VmEnd> | undefined;

  private constructor(qemu: Qemu, started: Started, parts: Parts) {
    this.qemu = qemu;
    this.started = started;
    this.#parts = parts;
    this.pins = parts.pins;
    this.disk = parts.disk;
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
      return new Vm(qemu, await parts.started(options.memoryMiB), parts);
    } catch (error) {
      await qemu?.close();
      await parts.close().catch(() => {});
      throw error;
    }
  }

  resume(): Promise<void> {
    return this.qemu.resume();
  }

  /** End QEMU and the threads; idempotent. */
  close(): Promise<VmEnd> {
    this.#closing ??= (async () => {
      await this.qemu.close();
      return await this.#parts.close();
    })();
    return this.#closing;
  }
}

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
    this.backendWorker = new WorkerHost(
      options.backendEntry ?? entry("backend-worker"),
      {
        ...{ socketFd: iommuFd, touchFd, iommu, counters: pins, assigned: [DISK_BDF] },
        ...{ strategy, pinner, policy, interval, quota },
      } satisfies BackendData,
      onEvent,
    );
    this.diskWorker = new WorkerHost(
      entry("disk-worker"),
      { socketFd: diskFd, touchFd, iommu, counters: disk, disk: options.disk } satisfies DiskData,
      onEvent,
    );
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
  async close(): Promise<VmEnd> {
    this.#closing = true;
    for (const { fds } of this.#devices) fds.forEach(closeFd);
    this.#devices = [];
    const disk = this.diskWorker.request<DiskStopped>("stop");
    await Promise.allSettled([disk, this.diskWorker.ended]);
    const backend = this.backendWorker.request<Stopped>("stop");
    await Promise.allSettled([backend, this.backendWorker.ended]);
    this.#touch.close();
    return { backend: await backend, disk: await disk };
  }

  #hear({ kind, message }: WorkerEvent, warn: (text: string) => void): void {
    if (this.#closing || kind === "peer-gone") return; // QEMU's end is told by QEMU's exit
    if (kind === "warning") warn(message);
    else this.failed.reject(new UserError(message, 1));
  }
}
