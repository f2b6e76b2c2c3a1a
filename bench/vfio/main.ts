/**
 * `bench -- vfio`: in a VM with an emulated IOMMU, or with `--device` on this machine, through a function that is bound to
 * vfio-pci.
 */
import { readFileSync } from "node:fs";
import os from "node:os";
import { VfioDevice } from "../../src/host/vfio-device.ts";
import { NVME, VfioMachine } from "../../test/vfio/machine.ts";
import { NativeBinary } from "../native/build.ts";
import { creation } from "./creation.ts";
import { entries } from "./entries.ts";
import { pinsAgainstC } from "./pins.ts";
import type { VfioReport } from "./report.ts";

const SOURCE = new URL("../native/vfio.c", import.meta.url);
const SIZES_MIB = [256, 512, 1024, 2048];
const CREATION_ROUNDS = 3;
/** Of a guest whose memory is the same 256 MiB again and again. */
const RAM_MIB = 16 * 1024;
/** Frames in no order: a tenth of what page by page reaches would do. */
const TOUCHES_MAX = 131_072;
const MACHINE_MIB = 4096;
const MEASURED_WITHIN_MS = 1_500_000;

export interface VfioOptions {
  /** Of this machine, as in "0000:00:06.0"; undefined: in a VM. */
  readonly device: string | undefined;
  /** The C loops, compiled before. */
  readonly native: string | undefined;
  readonly rounds: number;
}

export async function vfio(options: VfioOptions, say: (text: string) => void): Promise<VfioReport> {
  if (options.device !== undefined && options.native !== undefined)
    return here(options.device, options.native, options.rounds, say);
  using native = await NativeBinary.build(SOURCE, "library", say, []);
  return options.device === undefined
    ? inMachine(native.path, options.rounds, say)
    : here(options.device, native.path, options.rounds, say);
}

function here(device: string, native: string, rounds: number, say: (text: string) => void): VfioReport {
  const opened = VfioDevice.open(device);
  try {
    say("pins against bare ioctls");
    const pins = pinsAgainstC(opened.container, native, rounds);
    const found = entries(opened.container, RAM_MIB, TOUCHES_MAX, say);
    opened.close();
    return {
      bench: "vfio",
      kernel: os.release(),
      rounds,
      pins,
      entries: found,
      creation: creation(device, SIZES_MIB, CREATION_ROUNDS, say),
    };
  } finally {
    opened.close();
  }
}

async function inMachine(native: string, rounds: number, say: (text: string) => void): Promise<VfioReport> {
  const machine = await VfioMachine.boot({ memoryMiB: MACHINE_MIB }, say);
  try {
    await machine.bind(NVME);
    await machine.run(`echo ${readFileSync(native).toString("base64")} | base64 -d >/tmp/vfio.so`);
    say(`measuring in a VM of ${MACHINE_MIB} MiB, behind an emulated IOMMU`);
    const command = `bin/coiommu.js bench vfio --device ${NVME} --native /tmp/vfio.so --rounds ${rounds} --json /tmp/vfio.json`;
    await machine.node(command, MEASURED_WITHIN_MS);
    return JSON.parse(await machine.run("cat /tmp/vfio.json")) as VfioReport;
  } finally {
    await machine.close();
  }
}
