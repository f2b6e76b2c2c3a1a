import { UserError } from "../base/errors.ts";
import { type Bdf, FRAME_SIZE, formatBdf } from "../base/units.ts";
import type { Places } from "../driver/front-end.ts";
import type { NvmeIdentity } from "../driver/nvme-controller.ts";
import { IommufdDevice } from "../host/iommufd-device.ts";
import { reservedRanges, VfioDevice } from "../host/vfio-device.ts";
import type { MappedBar } from "../host/vfio-function.ts";
import { linux, type VfioKernel } from "../host/vfio-kernel.ts";
import type { WorkerHost } from "../machine/commands.ts";
import type { DeviceSetup } from "../machine/embedded/device.ts";
import type { Hole } from "../machine/embedded/ram.ts";
import { NVME_CLASS_CODE } from "../wire/nvme-admin.ts";
import type { DevicePinnerName, DeviceSpace } from "./pinners.ts";

/** An NVMe function of this machine that a guest is to use. */
export interface RealDiskOptions {
  readonly bdf: Bdf;
  /** Else it is only read. */
  readonly overwrite: boolean;
  /** The kernel that has it; tests put another one here. */
  readonly kernel?: VfioKernel;
}

/** A guest needs some memory from address 0 on. */
const LOW = 2 ** 26;

/** The function, opened: it reaches what is pinned in `space`, and nothing else. */
export class RealDisk {
  readonly space: DeviceSpace;
  /** Its registers. */
  readonly bar: MappedBar;
  /** Where its IOMMU lets no memory be. */
  readonly hole: Hole | undefined;
  readonly #device: VfioDevice | IommufdDevice;
  readonly #queues: DeviceSetup[] = [];

  /** Throws UserError, with what to do, where it cannot be had or is no NVMe controller. */
  constructor({ bdf, kernel = linux }: RealDiskOptions, pinner: DevicePinnerName, memoryMiB: number) {
    const name = formatBdf(bdf);
    const device = pinner === "vfio" ? VfioDevice.open(name, kernel) : IommufdDevice.open(name, kernel);
    this.#device = device;
    try {
      this.space =
        device instanceof VfioDevice
          ? { pinner: "vfio", container: device.container }
          : { pinner: "iommufd", iommufd: device.iommufd, ioas: device.ioas };
      const { classCode } = device.function;
      if (classCode !== NVME_CLASS_CODE)
        throw new UserError(
          `${name}: this is no NVMe controller: its class is ${classCode.toString(16).padStart(6, "0")}h`,
        );
      this.hole = holeOf(name, memoryMiB * 2 ** 20, kernel);
      this.bar = device.function.mapBar(0);
    } catch (error) {
      device.close();
      throw error;
    }
  }

  /** `cpu`: the one that boots. */
  async start(cpu: WorkerHost, places: Places | null): Promise<NvmeIdentity> {
    this.#device.function.startDma();
    return await cpu.request<NvmeIdentity>("startDisk", places);
  }

  async createQueue(cpu: WorkerHost, queue: DeviceSetup): Promise<void> {
    await cpu.request("createQueue", queue);
    this.#queues.push(queue);
  }

  /** Nothing is in flight: it keeps what it was given to write, and knows no memory any more. */
  async stop(cpu: WorkerHost): Promise<void> {
    for (const queue of this.#queues.splice(0)) await cpu.request("deleteQueue", queue);
    await cpu.request("stopDisk");
    this.stopDma();
  }

  /** Comes before any pin is released; no thread uses `bar` any more. Idempotent, as close(). */
  stopDma(): void {
    this.#device.function.stopDma();
  }

  close(): void {
    this.#device.close();
  }
}

/**
 * What the IOMMU reserves of the addresses that `bytes` of RAM take from 0 on, as one: of x86 that is 0xfee00000 to
 * 0xfeefffff, where interrupts go.
 */
function holeOf(name: string, bytes: number, kernel: VfioKernel): Hole | undefined {
  let [start, end] = [bytes, bytes];
  for (const range of reservedRanges(name, kernel).sort((a, b) => a.start - b.start)) {
    if (range.start >= bytes + (end - start)) break;
    if (start === end) start = Math.floor(range.start / FRAME_SIZE) * FRAME_SIZE;
    end = Math.ceil(range.end / FRAME_SIZE) * FRAME_SIZE;
  }
  if (start < LOW)
    throw new UserError(
      `${name}: its IOMMU reserves low addresses, from ${start} on, where a guest has RAM`,
      1,
    );
  return start < end ? { start, size: end - start } : undefined;
}
