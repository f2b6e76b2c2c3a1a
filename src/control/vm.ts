import { FRAME_SIZE } from "../base/units.ts";
import type { DeviceCounters } from "../device/counters.ts";
import { monotonicClock } from "../host/clock.ts";
import type { Guest } from "../machine/qemu/guest.ts";
import { type Qemu, type QemuDevice, startQemu } from "../machine/qemu/qemu.ts";
import { DEVICES_MAX } from "../tracking/software-iommu.ts";
import type { TrackingCounters } from "../tracking/tracker.ts";
import { Balloon } from "./balloon.ts";
import { DirtyFrames } from "./dirty.ts";
import { DISK_BDF, DISK_SLOT } from "./disk.ts";
import { GuestRecording } from "./guest-recording.ts";
import {
  countersAfterOneSecond,
  loadDrivers,
  type ModuleCounters,
  readCounters,
  unbindDisk,
} from "./guest-side.ts";
import type { Started } from "./host-side.ts";
import type {
  AssignedDevice,
  Booted,
  DriverState,
  Machine,
  MachineEnd,
  MachineOptions,
  Worked,
} from "./machine.ts";
import { Operator } from "./operator.ts";
import { type DiskPart, Parts } from "./parts.ts";
import { PluggedDisks } from "./plugged-disks.ts";
import { describeHost, type RunResult } from "./result.ts";
import { hasDriver, isRemapping } from "./strategy.ts";
import { runWorkload, type Workload } from "./workload.ts";

/** Our function comes before what it tracks, so that its driver is active when theirs bind. */
const IOMMU_SLOT = 3;
/** RAM above the PCI hole starts at 4 GiB, so GFNs reach at most this far beyond the RAM's size. */
const PCI_HOLE_FRAMES = 2 ** 32 / FRAME_SIZE;

export interface VmOptions extends MachineOptions {
  readonly guest: Guest;
  readonly accel: "auto" | "tcg" | "kvm";
  /** The guest's console is this process's terminal. */
  readonly shell?: boolean;
  /** More disks may be plugged while it runs. */
  readonly hotplug?: boolean;
  /** Firmware boots from the assigned disk, instead of what `guest` says. */
  readonly bootFromDisk?: boolean;
  /** More words for the guest kernel's command line. */
  readonly append?: readonly string[];
}

const USERSPACE_MS = 90_000;

/**
 * A QEMU with our function and our assigned disk, the threads that serve them, and what they count. Started with
 * the guest paused: `resume()` lets it run.
 */
export class Vm implements Machine {
  readonly name = "qemu";
  readonly host: RunResult["host"];
  readonly qemu: Qemu;
  readonly pins: TrackingCounters;
  readonly iommuTable: SharedArrayBuffer;
  readonly disk: DeviceCounters;
  readonly disks: PluggedDisks;
  readonly drivers = null;
  readonly operator: Operator;
  readonly dirty: DirtyFrames;
  readonly balloon: Balloon;
  readonly started: Started;
  readonly failed: Promise<never>;
  readonly #options: VmOptions;
  readonly #parts: Parts;
  #recording: GuestRecording | undefined;
  #closing: Promise<MachineEnd> | undefined;

  private constructor(qemu: Qemu, started: Started, parts: Parts, disk: DiskPart, options: VmOptions) {
    this.host = describeHost(qemu.version, qemu.accel);
    this.qemu = qemu;
    this.started = started;
    this.#options = options;
    this.#parts = parts;
    this.pins = parts.pins;
    this.iommuTable = parts.iommuTable;
    this.disk = disk.counters;
    this.disks = new PluggedDisks(qemu.qmp, parts, options.onWarning);
    this.operator = new Operator(parts.backendWorker, options);
    this.dirty = new DirtyFrames(parts.backendWorker);
    this.balloon = new Balloon(qemu.qmp, this.operator);
    this.failed = parts.failed.promise;
  }

  /** Throws UserError when a part cannot start; then nothing is left behind. */
  static async start(options: VmOptions): Promise<Vm> {
    const { faultCapable = false } = options;
    const parts = new Parts({
      ...options,
      frames: framesOf(options),
      assigned: [{ bdf: DISK_BDF, gate: 0, faultCapable }],
    });
    let qemu: Qemu | undefined;
    try {
      const disk = await parts.addDisk(options.disk, (error) => parts.failed.reject(error));
      qemu = await startQemu({
        ...(!options.bootFromDisk && { kernel: options.guest.kernel, initrd: options.guest.initrd }),
        memoryMiB: options.memoryMiB,
        cpus: options.cpus,
        accel: options.accel,
        devices: devicesOf(parts, disk, options),
        ...(options.append && { append: options.append }),
        ...(options.shell && { shell: true }),
      });
      return new Vm(qemu, await parts.started(options.memoryMiB), parts, disk, options);
    } catch (error) {
      await qemu?.close();
      await parts.close().catch(() => {});
      throw error;
    }
  }

  get devices(): readonly DeviceCounters[] {
    return [this.disk, ...this.disks.counters];
  }

  get assigned(): readonly AssignedDevice[] {
    return [{ bdf: DISK_BDF, counters: this.disk }, ...this.disks.assigned];
  }

  resume(): Promise<void> {
    return this.qemu.resume();
  }

  async boot(): Promise<Booted> {
    const kernel = await this.qemu.agent.hello(USERSPACE_MS);
    const userspaceAt = monotonicClock.now();
    const { guest, strategy, recording } = this.#options;
    const settings = { ...this.#options, frames: framesOf(this.#options) };
    if (recording) this.#recording = await GuestRecording.begin(this.qemu.agent, recording, settings);
    await loadDrivers(this.qemu.agent, guest, strategy, this.#options);
    return { kernel, userspaceAt };
  }

  async work(workload: Workload): Promise<Worked> {
    const { agent } = this.qemu;
    const [done, first] = await Promise.all([runWorkload(agent, workload), countersAfterOneSecond(agent)]);
    if (!this.#driven) return { workload: done, first: null, last: null };
    return { workload: done, first: stateOf(first), last: stateOf(await readCounters(agent)) };
  }

  async shutDown(): Promise<(DriverState & { live: number }) | null> {
    const { agent } = this.qemu;
    await unbindDisk(agent);
    await this.#recording?.end();
    if (!this.#driven) return null;
    const counters = await readCounters(agent);
    const last = stateOf(counters);
    // In no table.
    const remapped = last.framesMapped - last.framesUnmapped;
    return { ...last, live: isRemapping(this.#options.strategy) ? remapped : (counters.live_refs ?? 0) };
  }

  /** End QEMU and the threads; idempotent. */
  close(): Promise<MachineEnd> {
    this.#closing ??= (async () => {
      await this.qemu.close();
      return await this.#parts.close();
    })();
    return this.#closing;
  }

  get #driven(): boolean {
    return hasDriver(this.#options.strategy);
  }
}

const framesOf = ({ memoryMiB }: Pick<MachineOptions, "memoryMiB">): number =>
  (memoryMiB * 2 ** 20) / FRAME_SIZE + PCI_HOLE_FRAMES;

const devicesOf = (parts: Parts, disk: DiskPart, { bootFromDisk, hotplug }: VmOptions): QemuDevice[] => [
  {
    fds: [parts.takeIommuFd()],
    arguments: ([fd]) => ["-device", `x-pci-proxy-dev,id=coiommu,fd=${fd},addr=${IOMMU_SLOT}`],
  },
  {
    fds: [disk.takeFd()],
    arguments: ([fd]) => [
      ...["-chardev", `socket,id=disk,fd=${fd}`],
      "-device",
      `vhost-user-blk-pci,chardev=disk,num-queues=1,queue-size=256,iommu_platform=on,disable-legacy=on,addr=${DISK_SLOT}${bootFromDisk ? ",bootindex=0" : ""}`,
    ],
  },
  { fds: [], arguments: () => ["-device", "virtio-balloon-pci,id=balloon"] },
  // The root bus of q35 takes no device at run time. A firmware with ports to look at boots later.
  { fds: [], arguments: () => (hotplug ? ports() : []) },
];

const ports = (): string[] =>
  Array.from(
    { length: DEVICES_MAX - 1 },
    (_, i) => `pcie-root-port,id=port${i},chassis=${i},slot=${i}`,
  ).flatMap((port) => ["-device", port]);

const stateOf = (counters: ModuleCounters): DriverState => ({
  map: counters.map ?? 0,
  unmap: counters.unmap ?? 0,
  framesMapped: counters.frames_mapped ?? 0,
  framesUnmapped: counters.frames_unmapped ?? 0,
  pinRequests: counters.pin_requests ?? 0,
  mapRequests: counters.map_requests ?? 0,
  unmapRequests: counters.unmap_requests ?? 0,
  exits: counters.kicks ?? 0,
});
