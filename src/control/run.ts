import { UserError } from "../base/errors.ts";
import { formatBdf } from "../base/units.ts";
import { monotonicClock } from "../host/clock.ts";
import type { GuestAgent } from "../machine/qemu/agent.ts";
import { createPolicy } from "../policy/registry.ts";
import { describeHost, type RunResult } from "./result.ts";
import type { VmEnd, VmOptions } from "./vm.ts";
import { DISK_BDF, Vm } from "./vm.ts";
import { runWorkload, type Workload } from "./workload.ts";

export interface RunOptions extends VmOptions {
  readonly workload: Workload;
}

const USERSPACE_MS = 90_000;
const SETUP_MS = 60_000;
const SAMPLE_MS = 100;
const COUNTERS = "/sys/kernel/debug/coiommu/counters";

/** Our module before virtio_pci: then the disk's DMA operations are replaced before its driver binds. */
const setupScript = (options: RunOptions): string => `set -e
${options.strategy === "coiommu" ? `modprobe ${options.guest.moduleName}` : ""}
modprobe virtio_pci
modprobe virtio_blk
i=0; while [ ! -b /dev/vda ]; do i=$((i+1)); [ $i -lt 200 ] || { dmesg | tail -20; exit 1; }; usleep 50000; done
${options.strategy === "coiommu" ? `[ -e ${COUNTERS} ] || { dmesg | tail -20; exit 1; }` : ""}`;

/** Boot a guest, run a workload in it under one strategy, and end it. Leaves nothing behind, however it ends. */
export async function run(options: RunOptions, progress: (text: string) => void): Promise<RunResult> {
  const began = nowMs();
  progress("starting QEMU");
  const vm = await Vm.start(options);
  onInterrupt.add(vm);
  try {
    return await Promise.race([measure(vm, options, began, progress), vm.failed]);
  } finally {
    onInterrupt.delete(vm);
    await vm.close();
  }
}

/** VMs under way, to be closed when the process is told to end. */
const onInterrupt = new Set<Vm>();
export const closeAll = (): Promise<unknown> => Promise.allSettled([...onInterrupt].map((vm) => vm.close()));

async function measure(
  vm: Vm,
  options: RunOptions,
  began: number,
  progress: (text: string) => void,
): Promise<RunResult> {
  const { agent } = vm.qemu;
  await vm.resume();
  const resumed = nowMs();
  const samples: RunResult["samples"][number][] = [];
  const sampler = setInterval(() => samples.push(sample(vm, options, nowMs() - resumed)), SAMPLE_MS);
  try {
    progress("booting the guest");
    const kernel = await agent.hello(USERSPACE_MS);
    const userspace = nowMs();
    await demand(agent, setupScript(options), "loading the drivers");
    progress(`running ${options.workload.text}`);
    const tracked = options.strategy === "coiommu";
    const steadyFrom = tracked ? countersAfter(agent, 1) : null;
    const workload = await runWorkload(agent, options.workload);
    const [first, last] = [await steadyFrom, tracked ? await readCounters(agent) : null];
    const end = pinsOf(vm, options);
    await demand(
      agent,
      `echo ${formatBdf(DISK_BDF)} >/sys/bus/pci/drivers/virtio-pci/unbind`,
      "unbinding the disk",
    );
    const final = tracked ? await readCounters(agent) : null;
    clearInterval(sampler);
    const closed = await vm.close();
    return {
      schema: "coiommu.run/1",
      host: describeHost(vm.qemu.version, vm.qemu.accel),
      guest: { machine: "qemu", memoryMiB: options.memoryMiB, cpus: options.cpus, kernel },
      strategy: options.strategy,
      policy: tracked ? createPolicy(options.policy).name : null,
      policyParameters: tracked ? createPolicy(options.policy).parameters : null,
      pinner: options.strategy === "none" ? null : options.pinner,
      seed: null,
      creation: {
        pinMs: round(vm.started.pinMs),
        toFirstInstructionMs: round(resumed - began),
        toUserspaceMs: round(userspace - began),
      },
      workload,
      maps: {
        map: final?.map ?? null,
        unmap: final?.unmap ?? null,
        framesMapped: final?.frames_mapped ?? null,
        framesUnmapped: final?.frames_unmapped ?? null,
        liveAtEnd: final?.live_refs ?? null,
      },
      steady: first && last && difference(first, last),
      pins: end,
      kernel: kernelOf(vm, options, closed),
      dma: { transfers: vm.disk.transfers, bytes: vm.disk.bytes, faults: vm.disk.faults },
      samples,
    };
  } finally {
    clearInterval(sampler);
  }
}

type DriverCounters = Readonly<Record<string, number>>;

/** The module's counters: a line each, name and value. */
async function readCounters(agent: GuestAgent): Promise<DriverCounters> {
  const text = await demand(agent, `cat ${COUNTERS}`, "reading the driver's counters");
  return Object.fromEntries(
    text
      .trim()
      .split("\n")
      .map((line) => line.split(" "))
      .map(([name, value]) => [name, Number(value)]),
  );
}

async function countersAfter(agent: GuestAgent, seconds: number): Promise<DriverCounters> {
  await demand(agent, `sleep ${seconds}`, "waiting in the guest");
  return await readCounters(agent);
}

const difference = (first: DriverCounters, last: DriverCounters): RunResult["steady"] => ({
  maps: (last.map ?? 0) - (first.map ?? 0),
  pinRequests: (last.pin_requests ?? 0) - (first.pin_requests ?? 0),
});

async function demand(agent: GuestAgent, script: string, what: string): Promise<string> {
  const { code, output } = await agent.run(script, { timeoutMs: SETUP_MS, what });
  if (code !== 0) throw new UserError(`${what} failed in the guest: ${output.trim()}`, 1);
  return output;
}

function sample(vm: Vm, { strategy }: RunOptions, ms: number): RunResult["samples"][number] {
  const tracked = strategy === "coiommu";
  return {
    ms: Math.round(ms),
    pinned: vm.pins.framesNow,
    mapped: tracked ? vm.pins.framesMapped : null,
    requests: tracked ? vm.pins.pinRequests : null,
  };
}

function pinsOf(vm: Vm, { strategy, quota }: RunOptions): RunResult["pins"] {
  const tracked = strategy === "coiommu";
  const { pins } = vm;
  const now = monotonicClock.now();
  return {
    requests: tracked ? pins.pinRequests : null,
    refused: tracked ? pins.pinRequestsRefused : null,
    framesPinned: pins.framesPinned,
    framesUnpinned: pins.framesUnpinned,
    framesFirmware: tracked ? pins.framesFirmware : null,
    framesSpeculative: null,
    framesPeak: pins.framesPeak,
    framesMean: round((pins.frameTime + pins.framesNow * (now - pins.changedAt)) / (now - pins.startedAt)),
    framesAtEnd: pins.framesNow,
    quotaFrames: Number.isFinite(quota) ? quota : null,
  };
}

function kernelOf(vm: Vm, { strategy }: RunOptions, { backend }: VmEnd): RunResult["kernel"] {
  const before = backend.kernelPagesBefore;
  if (strategy === "none" || before === null) return { pinnedPagesPeak: null, source: "none" };
  return { pinnedPagesPeak: vm.pins.kernelPagesPeak - before, source: vm.started.kernelSource };
}

const nowMs = (): number => monotonicClock.now() / 1e6;
const round = (n: number): number => Math.round(n * 1000) / 1000;
