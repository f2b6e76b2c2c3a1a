import { type Errno, PeerGone } from "../base/errors.ts";
import { type Bdf, parseBdf } from "../base/units.ts";
import { type BlockStore, openStore, type StoreOptions } from "../device/block-store.ts";
import { DEVICE_COUNTERS } from "../device/counters.ts";
import { type Disk, serveDisk } from "../device/disk.ts";
import { drainFd, signalFd } from "../host/eventfd.ts";
import { closeFd } from "../host/libc.ts";
import { FdMapper } from "../host/mapping.ts";
import { Reactor } from "../host/reactor.ts";
import { UnixSocket } from "../host/socket.ts";
import { CommandServer, type WorkerBase } from "../machine/commands.ts";
import { counters } from "../memory/counters.ts";
import { DeviceGate } from "../tracking/software-iommu.ts";

/** Where the guest finds it: after our virtio-iommu. */
export const DISK_SLOT = 4;
export const DISK_BDF = parseBdf("00:04.0") as Bdf;

export interface DiskData {
  readonly wakeFd: number;
  /** Our end of the vhost-user socket pair. */
  readonly socketFd: number;
  readonly touchFd: number;
  readonly iommu: SharedArrayBuffer;
  /** Its number at the software IOMMU. */
  readonly gate: number;
  readonly counters: SharedArrayBuffer;
  readonly disk: StoreOptions;
}

/** Answer to "stop". */
export interface DiskStopped {
  /** How often the host refused a read or write of the image, by errno; the guest saw I/O errors. */
  readonly hostErrors: readonly (readonly [Errno, number])[];
}

/** The assigned disk's thread: serves vhost-user; every DMA goes through the software IOMMU. */
export class DiskThread {
  readonly #data: DiskData;
  readonly #reactor = new Reactor();
  readonly #commands: CommandServer;
  #store: BlockStore | undefined;
  #disk: Disk | undefined;
  #stopping = false;

  constructor(data: DiskData & WorkerBase) {
    this.#data = data;
    this.#commands = new CommandServer(data, {
      open: () => this.#open(),
      stop: () => this.#stop(),
    });
    this.#reactor.watch(data.wakeFd, () => {
      drainFd(data.wakeFd);
      this.#commands.serve();
    });
  }

  run(): void {
    while (!this.#stopping) this.#reactor.run(-1);
  }

  /** Throws UserError when the image cannot be used. */
  #open(): void {
    const { socketFd, touchFd, iommu, gate, disk } = this.#data;
    this.#store = openStore(disk);
    const deviceGate = new DeviceGate(iommu, gate, () => signalFd(touchFd));
    this.#disk = serveDisk({
      ports: {
        socket: new UnixSocket(socketFd),
        loop: this.#reactor,
        mapper: new FdMapper(),
        fds: { signal: signalFd, drain: drainFd, close: closeFd },
        mastering: (on) => deviceGate.setMastering(on),
      },
      store: this.#store,
      gate: deviceGate,
      counters: counters(DEVICE_COUNTERS, this.#data.counters),
      onClose: (error) => this.#commands.tellEnd(error ?? new PeerGone("QEMU has left")),
    });
  }

  #stop(): DiskStopped {
    this.#stopping = true;
    const hostErrors = [...(this.#disk?.device.hostErrors ?? [])];
    this.#disk?.close();
    if (!this.#disk) closeFd(this.#data.socketFd);
    this.#store?.close();
    return { hostErrors };
  }
}
