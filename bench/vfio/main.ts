/**
 * `bench -- vfio`: in a VM with an emulated IOMMU, or with `--device` on this machine, through a function that is bound to
 * vfio-pci.
 */
import { readFileSync } from "node:fs";
import { NVME, VfioMachine } from "../../test/vfio/machine.ts";
import { NativeBinary } from "../native/build.ts";
import { PARTS } from "./here.ts";
import type { VfioReport } from "./report.ts";

const SOURCE = new URL("../native/vfio.c", import.meta.url);
const MACHINE_MIB = 4096;
const PART_WITHIN_MS = 600_000;

/** `device`: of this machine, as in "0000:00:06.0"; undefined: in a VM. */
export async function vfio(
  device: string | undefined,
  rounds: number,
  say: (text: string) => void,
): Promise<VfioReport> {
  using native = await NativeBinary.build(SOURCE, "library", say, []);
  if (device === undefined) return await inMachine(native.path, rounds, say);
  return await all((part) => PARTS[part]!.measure({ device, native: native.path, rounds }), rounds, say);
}

async function inMachine(native: string, rounds: number, say: (text: string) => void): Promise<VfioReport> {
  const machine = await VfioMachine.boot({ memoryMiB: MACHINE_MIB }, say);
  try {
    await machine.bind(NVME);
    await machine.run(`echo ${readFileSync(native).toString("base64")} | base64 -d >/tmp/vfio.so`);
    const measure = async (part: string) => {
      const command = `bench/vfio/here.js ${part} ${NVME} /tmp/vfio.so ${rounds}`;
      return JSON.parse(await machine.node(command, PART_WITHIN_MS)) as Partial<VfioReport>;
    };
    return await all(measure, rounds, say);
  } finally {
    await machine.close();
  }
}

async function all(
  measure: (part: string) => Partial<VfioReport> | Promise<Partial<VfioReport>>,
  rounds: number,
  say: (text: string) => void,
): Promise<VfioReport> {
  let report: Partial<VfioReport> = { bench: "vfio", rounds, creation: [] };
  for (const [part, { says }] of Object.entries(PARTS)) {
    say(says);
    const found = await measure(part);
    const creation = [...report.creation!, ...(found.creation ?? [])];
    report = { ...report, ...found, creation };
  }
  return report as VfioReport;
}
