/**
 * `bench -- vfio`: in a VM with an emulated IOMMU, or with `--device` on this machine, through a function that is bound to
 * vfio-pci.
 */
import { readFileSync } from "node:fs";
import { NVME, VfioMachine } from "../../test/vfio/machine.ts";
import { NativeBinary } from "../native/build.ts";
import { here } from "./here.ts";
import type { VfioReport } from "./report.ts";

const SOURCE = new URL("../native/vfio.c", import.meta.url);
const MACHINE_MIB = 4096;
const MEASURED_WITHIN_MS = 1_500_000;

/** `device`: of this machine, as in "0000:00:06.0"; undefined: in a VM. */
export async function vfio(
  device: string | undefined,
  rounds: number,
  say: (text: string) => void,
): Promise<VfioReport> {
  using native = await NativeBinary.build(SOURCE, "library", say, []);
  return device === undefined
    ? await inMachine(native.path, rounds, say)
    : here({ device, native: native.path, rounds, say });
}

async function inMachine(native: string, rounds: number, say: (text: string) => void): Promise<VfioReport> {
  const machine = await VfioMachine.boot({ memoryMiB: MACHINE_MIB }, say);
  try {
    await machine.bind(NVME);
    await machine.run(`echo ${readFileSync(native).toString("base64")} | base64 -d >/tmp/vfio.so`);
    say(`measuring in a VM of ${MACHINE_MIB} MiB, behind an emulated IOMMU`);
    const measured = await machine.node(
      `bench/vfio/here.js ${NVME} /tmp/vfio.so ${rounds}`,
      MEASURED_WITHIN_MS,
    );
    return JSON.parse(measured.slice(measured.indexOf("{"))) as VfioReport;
  } finally {
    await machine.close();
  }
}
