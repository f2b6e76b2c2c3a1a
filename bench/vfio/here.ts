/** What `bench -- vfio` measures, on the machine that this runs on: `node here.js PART BDF LIBRARY ROUNDS` prints JSON. */
import os from "node:os";
import { VfioDevice } from "../../src/host/vfio-device.ts";
import { creation } from "./creation.ts";
import { entries } from "./entries.ts";
import { pinsAgainstC } from "./pins.ts";
import type { VfioReport } from "./report.ts";

const CREATION_ROUNDS = 3;
/** Of a guest whose memory is the same 256 MiB again and again. */
const RAM_MIB = 16 * 1024;
/** Frames in no order: twice what can be pinned page by page. */
const TOUCHES_MAX = 131_072;

export interface Setting {
  /** As in "0000:00:06.0", bound to vfio-pci. */
  readonly device: string;
  /** bench/native/vfio.c, compiled. */
  readonly native: string;
  readonly rounds: number;
}
type Part = Partial<VfioReport>;

const withContainer = (device: string, measure: (container: number) => Part): Part => {
  const opened = VfioDevice.open(device);
  try {
    return measure(opened.container);
  } finally {
    opened.close();
  }
};

const created = (memoryMiB: number) => ({
  says: `creating guests of ${memoryMiB} MiB`,
  measure: ({ device }: Setting): Part => ({ creation: [creation(device, memoryMiB, CREATION_ROUNDS)] }),
});

/** In this order; each takes minutes in an emulated machine. */
export const PARTS: Readonly<Record<string, { readonly says: string; measure(setting: Setting): Part }>> = {
  pins: {
    says: "pins against bare ioctls",
    measure: ({ device, native, rounds }) =>
      withContainer(device, (container) => ({
        kernel: os.release(),
        pins: pinsAgainstC(container, native, rounds),
      })),
  },
  entries: {
    says: `mappings of a guest of ${RAM_MIB} MiB`,
    measure: ({ device }) =>
      withContainer(device, (container) => ({ entries: entries(container, RAM_MIB, TOUCHES_MAX) })),
  },
  ...Object.fromEntries([256, 512, 1024, 2048].map((mib) => [`creation-${mib}`, created(mib)])),
};

if (import.meta.main) {
  const [part, device, native, rounds] = process.argv.slice(2) as [string, string, string, string];
  console.log(JSON.stringify(PARTS[part]!.measure({ device, native, rounds: Number(rounds) })));
}
