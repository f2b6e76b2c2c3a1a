import { UserError } from "../base/errors.ts";
import { formatBdf } from "../base/units.ts";
import type { GuestAgent } from "../machine/qemu/agent.ts";
import type { Guest } from "../machine/qemu/guest.ts";
import { DISK_BDF } from "./disk.ts";
import type { MachineOptions } from "./machine.ts";
import { hasDriver, isRemapping, type Strategy } from "./strategy.ts";

/** What is done inside the guest, beside the workload. */

const SETUP_MS = 60_000;
const DEBUGFS = "/sys/kernel/debug/coiommu";
/** Where the module's trace events go, in a recording. */
export const MAPS_TRACE = "/sys/kernel/tracing/instances/coiommu_maps";

/** Run a script in the guest that has to succeed; returns what it printed. */
export async function demand(agent: GuestAgent, script: string, what: string): Promise<string> {
  const { code, output } = await agent.run(script, { timeoutMs: SETUP_MS, what });
  if (code !== 0) throw new UserError(`${what} failed in the guest: ${output.trim()}`, 1);
  return output;
}

/** Our module before virtio_pci: then the disk's DMA operations are replaced before its driver binds. */
export async function loadDrivers(
  agent: GuestAgent,
  guest: Guest,
  strategy: Strategy,
  {
    faultCapable = false,
    frontEnd,
    recording,
  }: Pick<MachineOptions, "faultCapable" | "frontEnd" | "recording"> = {},
): Promise<void> {
  const driven = hasDriver(strategy);
  const parameters = [
    ...(frontEnd === "crosvm" ? ["crosvm=1"] : []),
    ...(isRemapping(strategy) ? ["remap=all"] : []),
    ...(strategy === "viommu-lazy" ? ["lazy=1"] : []),
    ...(faultCapable ? [`fault_capable=${formatBdf(DISK_BDF)}`] : []),
  ];
  const script = `set -e
${driven ? ["modprobe", guest.moduleName, ...parameters].join(" ") : ""}
${recording ? `echo 1 >${MAPS_TRACE}/events/coiommu/enable` : ""}
modprobe virtio_pci
modprobe virtio_blk
modprobe virtio_balloon
i=0; while [ ! -b /dev/vda ]; do i=$((i+1)); [ $i -lt 200 ] || { dmesg | tail -20; exit 1; }; usleep 50000; done
${driven ? `[ -e ${DEBUGFS}/counters ] || { dmesg | tail -20; exit 1; }` : ""}`;
  await demand(agent, script, "loading the drivers");
}

export async function unbindDisk(agent: GuestAgent): Promise<void> {
  const script = `echo ${formatBdf(DISK_BDF)} >/sys/bus/pci/drivers/virtio-pci/unbind`;
  await demand(agent, script, "unbinding the disk's driver");
}

/** The module's counters, by name. */
export type ModuleCounters = Readonly<Record<string, number>>;

const parseCounters = (text: string): ModuleCounters =>
  Object.fromEntries(
    text
      .split("\n")
      .map((line) => line.split(" "))
      .filter((words) => words.length === 2)
      .map(([name, value]) => [name, Number(value)]),
  );

/** Counters, and what a survey of the table finds (live_frames, live_refs, …). */
export async function readCounters(agent: GuestAgent): Promise<ModuleCounters> {
  return parseCounters(
    await demand(agent, `cat ${DEBUGFS}/counters ${DEBUGFS}/table`, "reading the driver's counters"),
  );
}

/**
 * The counters when a workload that starts now has run for a second; empty without the module, but then as much work
 * for the guest, so that strategies are disturbed alike.
 */
export async function countersAfterOneSecond(agent: GuestAgent): Promise<ModuleCounters> {
  const script = `sleep 1; cat ${DEBUGFS}/counters 2>/dev/null || true`;
  return parseCounters(await demand(agent, script, "reading the driver's counters"));
}
