import { setTimeout as sleep } from "node:timers/promises";
import { type Errno, invariant, UserError } from "../base/errors.ts";
import type { StoreOptions } from "../device/block-store.ts";
import { DEVICE_COUNTERS, type DeviceCounters } from "../device/counters.ts";
import { EventFd } from "../host/eventfd.ts";
import { closeFd } from "../host/libc.ts";
import { socketPair } from "../host/socket.ts";
import { type Wake, type WorkerEvent, WorkerHost, workerEntry } from "../machine/commands.ts";
import { counters, countersBuffer } from "../memory/counters.ts";
import { createIommuBuffer, DEVICES_MAX } from "../tracking/software-iommu.ts";
import { TRACKING_COUNTERS, type TrackingCounters } from "../tracking/tracker.ts";
import type { BackendData } from "./backend.ts";
import { whenPinned } from "./background.ts";
import type { DiskData, DiskStopped } from "./disk.ts";
import type { AssignedFunction, Started, Stopped } from "./host-side.ts";
import type { MachineEnd, MachineOptions } from "./machine.ts";

type Settings =
  | "strategy"
  | "frontEnd"
  | "policy"
  | "interval"
  | "speculate"
  | "quota"
  | "pinner"
  | "beforeActivation"
  | "activationTimeout"
  | "recording"
  | "onWarning"
  | "onProgress"
  | "backendEntry"
  | "deviceEntry";

export interface PartsOptions extends Pick<MachineOptions, Settings> {
  /** GFNs that the IOMMU's table covers, from 0. */
  readonly frames: number;
  /** Functions that are tracked from the start. */
  readonly assigned: readonly AssignedFunction[];
}

/** An assigned disk of ours: its thread, and QEMU's end of its socket until somebody takes it. */
export class DiskPart {
  readonly counters: DeviceCounters;
  /** Its number at the software IOMMU. */
  readonly gate: number;
  /** Resolves when its thread has ended, and nothing is left that it was in the middle of. */
  readonly over: Promise<void>;
  readonly #worker: WorkerHost;
  readonly #socket: HandOver;
  #ended = false;

  constructor(
    {
      worker,
      counters,
      gate,
      qemuFd,
    }: Pick<DiskPart, "counters" | "gate"> & {
      readonly worker: WorkerHost;
      readonly qemuFd: number;
    },
    over: (error: Error | undefined) => Promise<void>,
  ) {
    this.counters = counters;
    this.gate = gate;
    this.#worker = worker;
    this.#socket = new HandOver(qemuFd);
    this.over = worker.ended.then((error) => {
      this.#ended = true;
      return over(error);
    });
  }

  takeFd(): number {
    return this.#socket.take();
  }

  open(): Promise<void> {
    return this.#worker.request("open");
  }

  /** Undefined when its thread has ended unasked. */
  async stop(): Promise<DiskStopped | undefined> {
    this.#socket.close();
    const stopped = this.#ended ? undefined : await this.#worker.stop<DiskStopped>();
    await this.over;
    return stopped;
  }
}

/** An fd for QEMU, until somebody takes it to give it there. */
class HandOver {
  #fd: number | undefined;

  constructor(fd: number) {
    this.#fd = fd;
  }

  take(): number {
    const fd = this.#fd;
    invariant(fd !== undefined, "taken twice");
    this.#fd = undefined;
    return fd;
  }

  close(): void {
    if (this.#fd !== undefined) closeFd(this.take());
  }
}

/** Threads, shared memory and sockets of one VM, from before QEMU has them until after it has ended. */
export class Parts {
  readonly pins: TrackingCounters;
  readonly iommuTable: SharedArrayBuffer;
  readonly backendWorker: WorkerHost;
  readonly failed = Promise.withResolvers<never>();
  readonly #options: PartsOptions;
  readonly #touch = EventFd.create();
  readonly #iommuSocket: HandOver;
  readonly #disks = new Set<DiskPart>();
  /** Of the disks whose threads have not ended. */
  readonly #gates = new Set<number>();
  readonly #hostErrors: (readonly [Errno, number])[] = [];
  #closing = false;

  constructor(options: PartsOptions) {
    this.#options = options;
    const [iommuFd, qemuIommuFd] = socketPair();
    this.#iommuSocket = new HandOver(qemuIommuFd);
    this.iommuTable = createIommuBuffer(options.frames);
    const pins = countersBuffer(TRACKING_COUNTERS);
    this.pins = counters(TRACKING_COUNTERS, pins);
    this.failed.promise.catch(() => {});
    const { strategy, pinner, policy, interval, speculate = "off", quota, assigned } = options;
    const { beforeActivation, activationTimeout, frontEnd = "virtio-iommu" } = options;
    const wake = EventFd.create();
    this.backendWorker = this.#worker(
      "the backend",
      options.backendEntry ?? workerEntry(import.meta.url, "./backend-worker"),
      {
        ...{ wakeFd: wake.fd, socketFd: iommuFd, touchFd: this.#touch.fd, iommu: this.iommuTable },
        ...{ counters: pins, assigned, strategy, pinner, policy, interval, speculate, quota },
        ...{ beforeActivation, activationTimeout, frontEnd, qemu: true },
        recordingSince: options.recording?.began ?? null,
      } satisfies BackendData,
      wake,
      (error) => this.failed.reject(error),
    );
  }

  /** QEMU's end of the socket of the function that the guest's driver finds. */
  takeIommuFd(): number {
    return this.#iommuSocket.take();
  }

  /**
   * A thread with an open disk, which QEMU does not have yet. Throws UserError when its image cannot be used. `fails`: told
   * when it cannot be served any more; everything else goes on.
   */
  async addDisk(store: StoreOptions, fails: (error: Error) => void): Promise<DiskPart> {
    const gate = Array.from({ length: DEVICES_MAX }, (_, i) => i).find((i) => !this.#gates.has(i));
    if (gate === undefined) throw new UserError(`a VM has at most ${DEVICES_MAX} disks of ours`, 1);
    this.#gates.add(gate);
    const [diskFd, qemuFd] = socketPair();
    const shared = countersBuffer(DEVICE_COUNTERS);
    const wake = EventFd.create();
    let connected = true;
    const worker = this.#worker(
      "the disk",
      this.#options.deviceEntry ?? workerEntry(import.meta.url, "./disk-worker"),
      {
        ...{ wakeFd: wake.fd, socketFd: diskFd, touchFd: this.#touch.fd, iommu: this.iommuTable, gate },
        ...{ counters: shared, disk: store },
      } satisfies DiskData,
      wake,
      fails,
      () => {
        connected = false;
      },
    );
    const part = { worker, counters: counters(DEVICE_COUNTERS, shared), gate, qemuFd };
    const disk = new DiskPart(part, async (error) => {
      // A thread's descriptors are the process's: QEMU would wait for answers for ever.
      if (error && connected && this.#disks.has(disk)) closeFd(diskFd);
      await this.backendWorker.request("deviceEnded", gate).catch(() => {}); // it has ended too
      this.#gates.delete(gate);
    });
    this.#disks.add(disk);
    try {
      await disk.open();
      return disk;
    } catch (error) {
      await this.removeDisk(disk);
      throw error;
    }
  }

  /** Stop its thread, when QEMU has it no longer. */
  async removeDisk(disk: DiskPart): Promise<void> {
    if (!this.#disks.delete(disk)) return;
    this.#hostErrors.push(...((await disk.stop())?.hostErrors ?? []));
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
    if (started.ramBytes < enough)
      throw new UserError(`QEMU shares ${started.ramBytes} bytes of RAM, not ${memoryMiB} MiB`, 1);
    const ask = () => this.backendWorker.request<Started>("started");
    return await whenPinned(this.pins, ask, this.#options.onProgress);
  }

  /** Stop the threads: the disks first, because their DMA relies on the pins. */
  async close(): Promise<MachineEnd> {
    this.#closing = true;
    this.#iommuSocket.close();
    const disks = await Promise.allSettled([...this.#disks].map((disk) => this.removeDisk(disk)));
    const backend = this.backendWorker.stop<Stopped>();
    await Promise.allSettled([backend]);
    this.#touch.close();
    for (const disk of disks) if (disk.status === "rejected") throw disk.reason;
    return { backend: await backend, hostErrors: this.#hostErrors };
  }

  /** `fails`: told when it cannot serve any more; `left`: when it has closed its connection to QEMU. */
  #worker(
    name: string,
    entry: URL,
    data: object,
    wake: Wake,
    fails: (error: Error) => void,
    left: () => void = () => {},
  ): WorkerHost {
    const onEvent = (event: WorkerEvent) => {
      if (event.kind === "peer-gone" || event.kind === "broken") left();
      this.#hear(event, fails);
    };
    const worker = new WorkerHost({ name, entry, data, wake, onEvent });
    void worker.ended.then((error) => {
      if (error) fails(error);
    });
    return worker;
  }

  #hear({ kind, message }: WorkerEvent, fails: (error: Error) => void): void {
    if (kind === "log") this.#options.recording?.write(message);
    else if (this.#closing || kind === "peer-gone")
      return; // QEMU's end is told by QEMU's exit
    else if (kind === "warning") this.#options.onWarning?.(message);
    else fails(new UserError(message, 1));
  }
}
