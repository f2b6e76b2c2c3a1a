import { UserError } from "../base/errors.ts";
import { type Bdf, formatBdf, type Nanoseconds } from "../base/units.ts";
import type { DeviceCounters } from "../device/counters.ts";
import { monotonicClock } from "../host/clock.ts";
import { closeFd } from "../host/libc.ts";
import { type GuestRam, guestRam } from "../machine/qemu/guest-ram.ts";
import { LET_GO_MS_MAX, pciFunctions, plug, type QemuFunction, unplug } from "../machine/qemu/hotplug.ts";
import type { Qmp } from "../machine/qemu/qmp.ts";
import { connectQmp } from "../machine/qemu/qmp-socket.ts";
import type { TrackingCounters } from "../tracking/tracker.ts";
import { AssignedFunctions, type AssignedSet } from "./assigned-functions.ts";
import { Balloon } from "./balloon.ts";
import { DirtyFrames } from "./dirty.ts";
import type { Started } from "./host-side.ts";
import type { AssignedDevice, LiveMachine, MachineEnd, MachineOptions } from "./machine.ts";
import { Operator } from "./operator.ts";
import { Parts } from "./parts.ts";
import { type OpenDisk, type PluggedDisk, PluggedDisks } from "./plugged-disks.ts";
import { type AttachResult, describeHost } from "./result.ts";
import { dmaOf, kernelOf, pinsOf } from "./run.ts";

type Settings =
  | "policy"
  | "speculate"
  | "interval"
  | "pinner"
  | "activationTimeout"
  | "onWarning"
  | "backendEntry"
  | "deviceEntry";

export interface AttachOptions extends Pick<MachineOptions, Settings> {
  /** Path of QEMU's QMP socket. */
  readonly qmp: string;
  /** Functions that QEMU has already, as the guest numbers them, whose DMA is to be tracked. */
  readonly assigned: readonly Bdf[];
  /** Disks of ours to plug, tracked. */
  readonly disks: readonly PluggedDisk[];
  /** Frames, for a guest of this size. */
  quota(memoryMiB: number): number;
}

/** Name in QEMU of our virtio-iommu. */
const IOMMU_ID = "coiommu";
export const STRATEGY = "coiommu";

/** coIOMMU in a QEMU that a person has started, and that goes on without us. */
export class Attachment implements LiveMachine {
  readonly name = "qemu";
  readonly version: string;
  readonly ram: GuestRam;
  readonly pins: TrackingCounters;
  readonly iommuTable: SharedArrayBuffer;
  /** Of the disks of the options, in their order. */
  readonly diskIds: string[] = [];
  /** Of all disks of ours, those that have gone too. */
  readonly devices: readonly DeviceCounters[];
  readonly disks: PluggedDisks;
  readonly operator: Operator;
  readonly dirty: DirtyFrames;
  readonly balloon: Balloon;
  readonly drivers = null;
  /** Resolves when nothing is left to serve: the guest has let go of our virtio-iommu, or QEMU has ended. */
  readonly ended: Promise<"detached" | "qemu-ended">;
  /** Rejects when a part fails that should run. */
  readonly failed: Promise<never>;
  readonly #qmp: Qmp;
  readonly #options: AttachOptions;
  readonly #quota: number;
  readonly #parts: Parts;
  /** Where our virtio-iommu is. */
  #iommu: Bdf | undefined;
  readonly #iommuGone = Promise.withResolvers<void>();
  readonly #began: Nanoseconds = monotonicClock.now();
  #started: Started | undefined;
  #functions: AssignedFunctions | undefined;
  #closing: Promise<MachineEnd> | undefined;

  private constructor(qmp: Qmp, version: string, ram: GuestRam, options: AttachOptions) {
    this.version = version;
    this.ram = ram;
    this.#qmp = qmp;
    this.#options = options;
    this.#quota = options.quota(ram.memoryMiB);
    this.#parts = new Parts({
      ...{ ...options, strategy: STRATEGY, quota: this.#quota, frames: ram.frames },
      // The guest runs, and none of it has relied on us before.
      beforeActivation: "bios",
      // They are QEMU's: behind its IOMMU, not ours.
      assigned: options.assigned.map((bdf) => ({ bdf })),
    });
    this.pins = this.#parts.pins;
    this.disks = new PluggedDisks(qmp, this.#parts, options.onWarning);
    this.devices = this.disks.counters;
    this.iommuTable = this.#parts.iommuTable;
    this.failed = this.#parts.failed.promise;
    this.ended = Promise.race([
      this.#iommuGone.promise.then(() => "detached" as const),
      qmp.closed.then(() => "qemu-ended" as const),
    ]);
    this.operator = new Operator(this.#parts.backendWorker, { ...options, strategy: STRATEGY });
    this.dirty = new DirtyFrames(this.#parts.backendWorker);
    // Others may fill QEMU's balloon too; what is in it must not stay pinned.
    this.balloon = new Balloon(qmp, this.operator);
    qmp.onEvent(({ event, data }) => {
      if (event !== "DEVICE_DELETED" || data.device !== IOMMU_ID) return;
      this.#iommu = undefined;
      this.#iommuGone.resolve();
    });
  }

  /** Throws UserError when QEMU cannot have what is asked for; then it has nothing of ours. */
  static async start(options: AttachOptions): Promise<Attachment> {
    const { qmp, version } = await connectQmp(options.qmp);
    let attachment: Attachment | undefined;
    try {
      checkVersion(version);
      const assigned = await assignedFunctions(qmp, options.assigned);
      attachment = new Attachment(qmp, version, await guestRam(qmp), options);
      attachment.#follow(assigned);
      await Promise.race([attachment.#plugAll(), attachment.failed]);
      return attachment;
    } catch (error) {
      await attachment?.detach(LET_GO_MS_MAX).catch(() => {});
      await attachment?.close().catch(() => {});
      qmp.close();
      throw error;
    }
  }

  get started(): Started {
    return this.#started!;
  }

  /** Disks of ours, and of what is QEMU's that which it has now. */
  get assigned(): readonly AssignedDevice[] {
    const functions = this.#functions!.present.map((bdf) => ({ bdf, counters: null }));
    return [...this.disks.assigned, ...functions];
  }

  /** Where our function is in the guest, by its id; undefined when it is not there. */
  bdfOf(id = IOMMU_ID): Bdf | undefined {
    return id === IOMMU_ID ? this.#iommu : this.disks.bdfOf(id);
  }

  /** Ask the guest to let go of all of ours; the ids of what it has not let go of in time. */
  async detach(patienceMs: number): Promise<string[]> {
    const { ids } = this.disks;
    const gone = await Promise.all(ids.map((id) => this.disks.unplug(id, patienceMs)));
    // The disks' drivers need the virtio-iommu until they have gone.
    const left = ids.filter((_, i) => !gone[i]);
    if (left.length > 0 || this.#iommu === undefined) return left;
    return (await unplug(this.#qmp, IOMMU_ID, this.#iommuGone.promise, patienceMs)) ? [] : [IOMMU_ID];
  }

  /** End our side, whatever the guest still has of it; idempotent. */
  close(): Promise<MachineEnd> {
    this.#functions?.close();
    this.#qmp.close();
    this.#closing ??= this.#parts.close();
    return this.#closing;
  }

  /** What is told at the end; `end` is what close() returned. */
  result(end: MachineEnd): AttachResult {
    const policy = this.operator.policy!;
    const settings = { strategy: STRATEGY, quota: this.#quota } as const;
    return {
      schema: "coiommu.attach/1",
      host: describeHost(this.version, null),
      guest: { memoryMiB: this.ram.memoryMiB },
      assigned: this.#options.assigned.map(formatBdf),
      policy: policy.name,
      policyParameters: policy.parameters,
      intervalMs: this.pins.passInterval / 1e6,
      pinner: this.#options.pinner,
      attachedMs: Math.round((monotonicClock.now() - this.#began) / 1e6),
      pins: pinsOf(this, settings),
      kernel: kernelOf({ pins: this.pins, started: this.started }, settings, end),
      dma: this.devices.length > 0 ? dmaOf(this) : null,
    };
  }

  #follow(functions: readonly QemuFunction[]): void {
    const backend = this.#parts.backendWorker;
    const set: AssignedSet = {
      assign: (assigned) => backend.request("assign", assigned),
      // A disk of ours may have been plugged where it was.
      unassign: async (bdf) =>
        this.disks.assigned.some((disk) => disk.bdf === bdf) || backend.request("unassign", bdf),
    };
    this.#functions = new AssignedFunctions(this.#qmp, set, functions, this.#options.onWarning);
  }

  async #plugAll(): Promise<void> {
    // Images that cannot be used are found out before QEMU has anything of ours.
    const open: OpenDisk[] = [];
    for (const disk of this.#options.disks) open.push(await this.disks.open(disk));
    await this.#plugIommu();
    for (const disk of open) this.diskIds.push(await this.disks.plug(disk));
  }

  async #plugIommu(): Promise<void> {
    const fd = this.#parts.takeIommuFd();
    try {
      this.#iommu = await plug(
        this.#qmp,
        { driver: "x-pci-proxy-dev", id: IOMMU_ID, fd: IOMMU_ID },
        {
          before: () => this.#qmp.giveFd(IOMMU_ID, fd),
          // It has it still, unless it got as far as using it.
          refused: () => this.#qmp.execute("closefd", { fdname: IOMMU_ID }).then(ignore, ignore),
        },
      );
    } finally {
      closeFd(fd);
    }
    this.#started = await this.#parts.started(this.ram.memoryMiB);
  }
}

const ignore = (): void => {};

function checkVersion(version: string): void {
  if (version.startsWith("7.")) return;
  throw new UserError(
    `this is QEMU ${version}; coIOMMU attaches to QEMU 7.2, whose x-pci-proxy-dev later ones have broken ` +
      "(they crash without KVM)",
    1,
  );
}

async function assignedFunctions(qmp: Qmp, assigned: readonly Bdf[]): Promise<QemuFunction[]> {
  const functions = await pciFunctions(qmp);
  const ours = functions.map(({ id }) => id).filter((id) => id.startsWith(IOMMU_ID));
  if (ours.length > 0)
    throw new UserError(
      `this QEMU has ${ours.join(", ")} already: another coiommu serves it, or one was killed; ` +
        "then device_del them, and reset the VM",
      1,
    );
  const missing = assigned.filter((bdf) => !functions.some((f) => f.bdf === bdf));
  if (missing.length === 0) return functions.filter(({ bdf }) => assigned.includes(bdf));
  const there = functions.map((f) => formatBdf(f.bdf) + (f.id && ` (${f.id})`)).join(", ");
  throw new UserError(`the VM has no function ${missing.map(formatBdf).join(", ")}; it has ${there}`, 1);
}
