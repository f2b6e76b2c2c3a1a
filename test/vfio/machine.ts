/**
 * The proof machine: a QEMU with an emulated VT-d and a real NVMe function behind it, in which Node runs this checkout.
 * What the IOMMU blocks is known from QEMU's own trace, whatever the guest says.
 */
import { closeSync, mkdtempSync, openSync, readSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Bdf } from "../../src/base/units.ts";
import { type Qemu, startQemu } from "../../src/machine/qemu/qemu.ts";
import { CHECKOUT, ensureVfioGuest } from "./guest.ts";

/** The NVMe function. */
export const NVME = "0000:00:06.0";
/** How many mappings a container may have that is opened from now on. */
export const ENTRY_LIMIT = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";
const DISK_MIB = 64;

/** Characters of what a program printed that failed. */
const OUTPUT_SHOWN = 4000;
const USERSPACE_MS = 90_000;
/**
 * With two, V8 crashes in one run of four, with one it never did: QEMU 7.2 emulates each CPU in a thread of its own, and
 * that does not go with a JIT.
 */
const CPUS = 1;

export interface VfioMachineOptions {
  readonly memoryMiB?: number;
  /** More words for the kernel's command line. */
  readonly append?: readonly string[];
}

/** A DMA that the IOMMU has blocked, or a part of one: QEMU tells of each access to memory that it makes. */
export interface Fault {
  /** Of the request. */
  readonly source: Bdf;
  readonly address: number;
  readonly write: boolean;
}

const FAULT = /^vtd_dmar_fault sid (0x[0-9a-f]+) fault \d+ addr (0x[0-9a-f]+) write ([01])$/;

export class VfioMachine {
  readonly qemu: Qemu;
  readonly #folder: string;
  #read = 0;

  private constructor(qemu: Qemu, folder: string) {
    this.qemu = qemu;
    this.#folder = folder;
  }

  /** Resolves when its user space is up; the modules are loaded, and no function is bound to vfio-pci. */
  static async boot(
    { memoryMiB = 1024, append = [] }: VfioMachineOptions = {},
    report: (text: string) => void = () => {},
  ): Promise<VfioMachine> {
    const guest = await ensureVfioGuest(report);
    const folder = mkdtempSync(join(tmpdir(), "coiommu-vfio-"));
    const disk = join(folder, "disk");
    writeFileSync(disk, "");
    truncateSync(disk, DISK_MIB * 2 ** 20);
    const devices = [
      ...["-device", "intel-iommu,intremap=on,caching-mode=on"],
      ...["-blockdev", `file,node-name=d0,filename=${disk}`],
      ...["-device", `nvme,drive=d0,serial=coiommu,addr=06.0`],
      ...["-trace", "vtd_dmar_fault", "-D", join(folder, "trace")],
    ];
    const qemu = await startQemu({
      ...{ kernel: guest.kernel, initrd: guest.initrd, memoryMiB, cpus: CPUS, accel: "tcg" },
      append: ["intel_iommu=on", ...append],
      machine: ["kernel-irqchip=split"],
      devices: [{ fds: [], arguments: () => devices }],
    });
    const machine = new VfioMachine(qemu, folder);
    try {
      await qemu.resume();
      await qemu.agent.hello(USERSPACE_MS);
      await machine.run("modprobe vfio_iommu_type1 && modprobe vfio_pci");
      return machine;
    } catch (error) {
      await machine.close();
      throw error;
    }
  }

  /** What a shell script prints. Throws when it fails. */
  async run(script: string, timeoutMs = 60_000): Promise<string> {
    const what = script.split("\n")[0]!.slice(0, 100);
    const { code, output } = await this.qemu.agent.run(script, { timeoutMs, what });
    if (code !== 0)
      throw new Error(`exit code ${code} in the guest: ${script}\n${output.slice(-OUTPUT_SHOWN)}`);
    return output;
  }

  /** What a program of this checkout prints: "test/vfio/fuzz.ts --seed 1". */
  node(commandLine: string, timeoutMs?: number): Promise<string> {
    return this.run(`cd ${CHECKOUT} && exec node ${commandLine}`, timeoutMs);
  }

  /** Take a function away from the guest kernel's driver, for user space. */
  async bind(bdf = NVME): Promise<void> {
    const device = `/sys/bus/pci/devices/${bdf}`;
    await this.run(`echo vfio-pci >${device}/driver_override
[ ! -e ${device}/driver ] || echo ${bdf} >${device}/driver/unbind
echo ${bdf} >/sys/bus/pci/drivers_probe
[ "$(basename "$(readlink ${device}/driver)")" = vfio-pci ]`);
  }

  /** What the IOMMU has blocked since this was last asked. */
  faults(): Fault[] {
    const lines = this.#newTrace().split("\n");
    return lines
      .filter((line) => line !== "")
      .map((line) => {
        const [, source, address, write] = FAULT.exec(line) ?? [];
        if (source === undefined) throw new Error(`no fault in QEMU's trace: ${line}`);
        return { source: Number(source) as Bdf, address: Number(address), write: write === "1" };
      });
  }

  #newTrace(): string {
    const fd = openSync(join(this.#folder, "trace"), "r");
    try {
      const parts: Buffer[] = [];
      for (;;) {
        const part = Buffer.alloc(2 ** 20);
        const length = readSync(fd, part, 0, part.length, this.#read);
        if (length === 0) return Buffer.concat(parts).toString("latin1");
        this.#read += length;
        parts.push(part.subarray(0, length));
      }
    } finally {
      closeSync(fd);
    }
  }

  async close(): Promise<void> {
    await this.qemu.close();
    rmSync(this.#folder, { recursive: true, force: true });
  }
}
