import { monotonicClock } from "../host/clock.ts";
import { createPolicy } from "../policy/registry.ts";
import {
  countersAfterOneSecond,
  type DriverCounters,
  loadDrivers,
  readCounters,
  unbindDisk,
} from "./guest-side.ts";
import { describeHost, type RunResult } from "./result.ts";
import { Vm, type VmEnd, type VmOptions } from "./vm.ts";
import { runWorkload, type Workload } from "./workload.ts";

export interface RunOptions extends VmOptions {
  readonly workload: Workload;
}

const USERSPACE_MS = 90_000;
const SAMPLE_MS = 100;

export interface Outcome {
  readonly result: RunResult;
  /** What went wrong without ending the run, in words for a person; empty when all is well. */
  readonly complaints: readonly string[];
}

/** Boot a guest, run a workload in it under one strategy, and end it. Leaves nothing behind, however it ends. */
export async function run(options: RunOptions, progress: (text: string) => void): Promise<Outcome> {
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
): Promise<Outcome> {
  const { agent } = vm.qemu;
  await vm.resume();
  const resumed = nowMs();
  const samples: RunResult["samples"][number][] = [];
  const sampler = setInterval(() => samples.push(sample(vm, options, nowMs() - resumed)), SAMPLE_MS);
  try {
    progress("booting the guest");
    const kernel = await agent.hello(USERSPACE_MS);
    const userspace = nowMs();
    await loadDrivers(agent, options.guest, options.strategy);
    progress(`running ${options.workload.text}`);
    const tracked = options.strategy === "coiommu";
    const policy = tracked ? createPolicy(options.policy) : undefined;
    const [workload, first] = await Promise.all([
      runWorkload(agent, options.workload),
      countersAfterOneSecond(agent),
    ]);
    const last = tracked ? await readCounters(agent) : null;
    const end = pinsOf(vm, options);
    await unbindDisk(agent);
    const final = tracked ? await readCounters(agent) : null;
    clearInterval(sampler);
    const closed = await vm.close();
    const result: RunResult = {
      schema: "coiommu.run/1",
      host: describeHost(vm.qemu.version, vm.qemu.accel),
      guest: { machine: "qemu", memoryMiB: options.memoryMiB, cpus: options.cpus, kernel },
      strategy: options.strategy,
      policy: policy?.name ?? null,
      policyParameters: policy?.parameters ?? null,
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
      steady: last && difference(first, last),
      pins: end,
      kernel: kernelOf(vm, options, closed),
      dma: { transfers: vm.disk.transfers, bytes: vm.disk.bytes, faults: vm.disk.faults },
      samples,
    };
    return { result, complaints: complaintsOf(result, closed, options) };
  } finally {
    clearInterval(sampler);
  }
}

function complaintsOf({ workload, dma }: RunResult, { disk }: VmEnd, options: RunOptions): string[] {
  const complaints = disk.hostErrors.map(
    ([errno, times]) => `the host refused ${times} accesses to the disk image ${options.disk.file}: ${errno}`,
  );
  if (workload.errors > 0) complaints.push(`the workload met ${workload.errors} errors`);
  if (workload.verified === false) complaints.push("what the workload wrote is not what it read back");
  if (dma.faults > 0) complaints.push(`the disk met ${dma.faults} DMA faults`);
  return complaints;
}

const difference = (first: DriverCounters, last: DriverCounters): RunResult["steady"] => ({
  maps: (last.map ?? 0) - (first.map ?? 0),
  pinRequests: (last.pin_requests ?? 0) - (first.pin_requests ?? 0),
});

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
