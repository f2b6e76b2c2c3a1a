import { UserError } from "../base/errors.ts";
import { formatBdf } from "../base/units.ts";
import type { GuestAgent } from "../machine/qemu/agent.ts";
import type { Guest } from "../machine/qemu/guest.ts";
import type { Strategy } from "./backend.ts";
import { DISK_BDF } from "./vm.ts";

/** What is done inside the guest, beside the workload. */

const SETUP_MS = 60_000;
const COUNTERS = "/sys/kernel/debug/coiommu/counters";

/** Run a script in the guest that has to succeed; returns what it printed. */
export async function demand(agent: GuestAgent, script: string, what: string): Promise<string> {
  const { code, output } = await agent.run(script, { timeoutMs: SETUP_MS, what });
  if (code !== 0) throw new UserError(`${what} failed in the guest: ${output.trim()}`, 1);
  return output;
}

/** Our module before virtio_pci: then the disk's DMA operations are replaced before its driver binds. */
export async function loadDrivers(agent: GuestAgent, guest: Guest, strategy: Strategy): Promise<void> {
  const tracked = strategy === "coiommu";
  const script = `set -e
${tracked ? `modprobe ${guest.moduleName}` : ""}
modprobe virtio_pci
modprobe virtio_blk
i=0; while [ ! -b /dev/vda ]; do i=$((i+1)); [ $i -lt 200 ] || { dmesg | tail -20; exit 1; }; usleep 50000; done
${tracked ? `[ -e ${COUNTERS} ] || { dmesg | tail -20; exit 1; }` : ""}`;
  await demand(agent, script, "loading the drivers");
}

export async function unbindDisk(agent: GuestAgent): Promise<void> {
  const script = `echo ${formatBdf(DISK_BDF)} >/sys/bus/pci/drivers/virtio-pci/unbind`;
  await demand(agent, script, "unbinding the disk's driver");
}

/** The module's counters, by name. */
export type DriverCounters = Readonly<Record<string, number>>;

export async function readCounters(agent: GuestAgent): Promise<DriverCounters> {
  const text = await demand(agent, `cat ${COUNTERS}`, "reading the driver's counters");
  const lines = text.trim().split("\n");
  return Object.fromEntries(
    lines.map((line) => line.split(" ")).map(([name, value]) => [name, Number(value)]),
  );
}
