import type { Bdf } from "../base/units.ts";
import type { StoreOptions } from "../device/block-store.ts";
import type { DeviceCounters } from "../device/counters.ts";
import { closeFd } from "../host/libc.ts";
import { plug, unplug } from "../machine/qemu/hotplug.ts";
import type { Qmp } from "../machine/qemu/qmp.ts";
import type { AssignedFunction } from "./host-side.ts";
import type { AssignedDevice } from "./machine.ts";
import type { DiskPart, Parts } from "./parts.ts";

export type PluggedDisk = StoreOptions & Pick<AssignedFunction, "faultCapable">;

/** A disk whose image is open, and that QEMU does not have yet. */
export interface OpenDisk {
  readonly id: string;
  readonly disk: DiskPart;
  readonly faultCapable: boolean;
}

interface Present {
  readonly bdf: Bdf;
  readonly disk: DiskPart;
  /** Resolves when QEMU has it no longer, and all behind it has ended. */
  readonly gone: PromiseWithResolvers<void>;
}

/** Disks of ours that a QEMU is given while it runs, and that its guest may let go of, asked by whomever. */
export class PluggedDisks {
  /** Of those that have gone, too. */
  readonly counters: DeviceCounters[] = [];
  readonly #qmp: Qmp;
  readonly #parts: Parts;
  readonly #warn: (text: string) => void;
  readonly #present = new Map<string, Present>();
  #opened = 0;

  constructor(qmp: Qmp, parts: Parts, warn: (text: string) => void = () => {}) {
    this.#qmp = qmp;
    this.#parts = parts;
    this.#warn = warn;
    qmp.onEvent(({ event, data }) => {
      if (event === "DEVICE_DELETED" && typeof data.device === "string") void this.#deleted(data.device);
    });
  }

  get ids(): string[] {
    return [...this.#present.keys()];
  }

  get assigned(): AssignedDevice[] {
    return [...this.#present.values()].map(({ bdf, disk }) => ({ bdf, counters: disk.counters }));
  }

  bdfOf(id: string): Bdf | undefined {
    return this.#present.get(id)?.bdf;
  }

  /** Throws UserError when its image cannot be used. */
  async open({ faultCapable = false, ...store }: PluggedDisk): Promise<OpenDisk> {
    const id = `coiommu-disk${this.#opened++}`;
    const disk = await this.#parts.addDisk(store, ({ message }) =>
      this.#warn(`${id} serves the VM no longer, which goes on without it: ${message}`),
    );
    return { id, disk, faultCapable };
  }

  /** Tracked from before the guest's driver can bind. Throws UserError when QEMU does not take it: then all is as before. */
  async plug({ id, disk, faultCapable }: OpenDisk): Promise<string> {
    const backend = this.#parts.backendWorker;
    try {
      // One that a killed coiommu has left stays when its disk has gone.
      await this.#qmp.execute("chardev-remove", { id }).catch(() => {});
      const fd = disk.takeFd();
      await this.#qmp.giveFd(id, fd).finally(() => closeFd(fd));
      const socket = { type: "socket", data: { addr: { type: "fd", data: { str: id } }, server: false } };
      await this.#qmp.execute("chardev-add", { id, backend: socket });
      const device = { driver: "vhost-user-blk-pci", id, chardev: id, "num-queues": 1, "queue-size": 256 };
      const bdf = await plug(
        this.#qmp,
        { ...device, iommu_platform: true, "disable-legacy": "on" },
        {
          before: (bdf) =>
            backend.request("assign", { bdf, gate: disk.gate, faultCapable } satisfies AssignedFunction),
          refused: (bdf) => backend.request("unassign", bdf),
        },
      );
      this.counters.push(disk.counters);
      this.#present.set(id, { bdf, disk, gone: Promise.withResolvers() });
      return id;
    } catch (error) {
      await this.#qmp.execute("chardev-remove", { id }).catch(() => {});
      await this.#parts.removeDisk(disk).catch(() => {});
      throw error;
    }
  }

  /** Ask the guest to let go of one. False when it has not in time: it still may. */
  async unplug(id: string, patienceMs: number): Promise<boolean> {
    const gone = this.#present.get(id)?.gone.promise;
    return !gone || (await unplug(this.#qmp, id, gone, patienceMs));
  }

  async #deleted(id: string): Promise<void> {
    const present = this.#present.get(id);
    if (!present) return;
    this.#present.delete(id);
    try {
      await this.#parts.backendWorker.request("unassign", present.bdf);
      await this.#parts.removeDisk(present.disk);
      await this.#qmp.execute("chardev-remove", { id });
    } catch (error) {
      this.#warn(`taking ${id} away: ${(error as Error).message}`);
    } finally {
      present.gone.resolve();
    }
  }
}
