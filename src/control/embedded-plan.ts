import { UserError } from "../base/errors.ts";
import { type Bdf, FRAME_SIZE } from "../base/units.ts";
import type { NvmeIdentity } from "../driver/nvme-controller.ts";
import { framesOfCpu } from "../machine/embedded/cpu.ts";
import type { DeviceKind } from "../machine/embedded/device.ts";
import type { LoadSpec } from "../machine/embedded/load.ts";
import { type FioWorkload, WRITTEN_REGION } from "../machine/workload-text.ts";
import { DEVICES_MAX } from "../tracking/software-iommu.ts";
import type { MachineOptions } from "./machine.ts";
import type { Workload } from "./workload.ts";

export interface EmbeddedOptions extends MachineOptions {
  readonly workload: Workload;
  /** As backendEntry. */
  readonly cpuEntry?: URL;
}

/** An assigned device, and the CPUs that use it. */
export interface DevicePlan {
  readonly kind: DeviceKind;
  readonly endpoint: Bdf;
  readonly cpus: readonly number[];
}

/** Slot 3 is our function's, as in a VM. */
const FIRST_SLOT = 4;
const bdfOf = (device: number): Bdf => ((FIRST_SLOT + device) << 3) as Bdf;

/** One disk, with a queue for each CPU; of other devices each CPU has its own, as far as there are any. */
export function planDevices({ cpus, workload: { name }, device }: EmbeddedOptions): DevicePlan[] {
  const all = Array.from({ length: cpus }, (_, cpu) => cpu);
  if (name !== "nic" && name !== "gpu")
    return [{ kind: "disk", endpoint: device?.bdf ?? bdfOf(0), cpus: all }];
  return all.slice(0, DEVICES_MAX).map((cpu) => ({ kind: name, endpoint: bdfOf(cpu), cpus: [cpu] }));
}

/** Frames that buffers lie in, over all CPUs: 4 MiB that a busy program reuses, some often and some rarely. */
const CACHE_FRAMES = 1024;
/** Room for the largest request, 1 MiB, with some to choose from. */
const CACHE_FRAMES_MIN = 320;

/** What each CPU does; undefined for nothing. `disk`: what a real one is. Throws UserError for what does not fit. */
export function planLoads(
  options: EmbeddedOptions,
  diskBytes: number,
  disk?: NvmeIdentity,
): (LoadSpec | undefined)[] {
  const { workload, cpus, memoryMiB, device } = options;
  if (disk && disk.queuePairs < cpus)
    throw new UserError(`--cpus ${cpus}: the disk has a queue for ${disk.queuePairs} of them only`, 1);
  const frames = framesOfCpu(memoryMiB * 2 ** 20, cpus);
  const cacheFrames = Math.max(Math.floor(CACHE_FRAMES / cpus), CACHE_FRAMES_MIN);
  const wrong = (what: string) => new UserError(`--workload ${workload.text}: ${what}`);
  const each = (load: (cpu: number) => LoadSpec | undefined) =>
    Array.from({ length: cpus }, (_, cpu) => load(cpu));
  switch (workload.name) {
    case "idle":
      return each((cpu) => ({ name: "idle", seconds: workload.seconds, queue: cpu + 1, disk }));
    case "fio": {
      const { blockSize } = workload.fio;
      if (disk && blockSize % disk.blockSize !== 0)
        throw wrong(`bs must be a multiple of the disk's blocks, of ${disk.blockSize} bytes`);
      if (disk && blockSize > disk.transferMax)
        throw wrong(`bs must be at most ${disk.transferMax}, which the disk moves at once`);
      const readOnly = device !== undefined && !device.overwrite;
      const parts = shares(workload.fio, cpus, diskBytes);
      if (parts.length === 0) throw wrong(`the disk, of ${diskBytes} bytes, is smaller than a block`);
      const common = { name: "fio", cacheFrames, disk, readOnly } as const;
      return each((cpu) => parts[cpu] && { ...common, queue: cpu + 1, ...parts[cpu] });
    }
    case "nic":
      return each((cpu) => (cpu < DEVICES_MAX ? { name: "nic", nic: workload.nic, cacheFrames } : undefined));
    case "gpu": {
      const { buffers, size } = workload.gpu;
      // One buffer more, so that one that is replaced gets other frames; and the table has 8 bytes for each.
      const needed = ((buffers + 1) * size) / FRAME_SIZE;
      if (needed * 1.01 > frames)
        throw wrong(`its buffers need more than each CPU's ${frames} frames of memory`);
      return each((cpu) => (cpu < DEVICES_MAX ? { name: "gpu", gpu: workload.gpu } : undefined));
    }
    default:
      throw wrong("needs a VM");
  }
}

/** One fio job over several CPUs: its queue depth and its part of the disk are divided among them. */
function shares(fio: FioWorkload, cpus: number, diskBytes: number) {
  const blocks = Math.floor(Math.min(fio.size ?? WRITTEN_REGION, diskBytes) / fio.blockSize);
  const busy = Math.min(cpus, fio.ioDepth, blocks);
  const share = (of: number, i: number) => Math.floor((of + i) / busy);
  let start = 0;
  return Array.from({ length: busy }, (_, i) => {
    const region = { start, size: share(blocks, i) * fio.blockSize };
    start += region.size;
    return { fio: { ...fio, size: region.size, ioDepth: share(fio.ioDepth, i) }, region };
  });
}
