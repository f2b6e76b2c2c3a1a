import { formatBdf } from "../base/units.ts";
import { monotonicClock } from "../host/clock.ts";
import { sums } from "../memory/counters.ts";
import { meanPinned, type TrackingCounters } from "../tracking/counters.ts";
import { backgroundText } from "./background.ts";
import { claimsOf } from "./claims.ts";
import type { DriverState, LiveMachine, Machine, MachineEnd, MachineOptions, Worked } from "./machine.ts";
import type { RunResult } from "./result.ts";
import { speculationOf } from "./speculating.ts";
import { hasDriver, isRemapping } from "./strategy.ts";
import type { Workload } from "./workload.ts";

export interface RunOptions extends MachineOptions {
  readonly workload: Workload;
  /** Is told of the guest while it is live. */
  readonly api?: { guest: LiveGuest | undefined };
}

/** A guest, and what it was started with. */
export interface LiveGuest {
  readonly machine: LiveMachine;
  readonly options: Pick<MachineOptions, "strategy">;
}

const SAMPLE_MS = 100;

export interface Outcome {
  readonly result: RunResult;
  /** What went wrong without ending the run, in words for a person; empty when all is well. */
  readonly complaints: readonly string[];
}

/**
 * Start a guest with `start`, run a workload in it under one strategy, and end it. Leaves nothing behind, however it
 * ends.
 */
export async function run(
  options: RunOptions,
  start: () => Promise<Machine>,
  progress: (text: string) => void,
): Promise<Outcome> {
  const began = nowMs();
  const machine = await start();
  onInterrupt.add(machine);
  if (options.api) options.api.guest = { machine, options };
  try {
    return await Promise.race([measure(machine, options, began, progress), machine.failed]);
  } finally {
    onInterrupt.delete(machine);
    if (options.api) options.api.guest = undefined;
    await machine.close();
  }
}

/** Machines under way, to be closed when the process is told to end. */
const onInterrupt = new Set<Machine>();
export const closeAll = (): Promise<unknown> => Promise.allSettled([...onInterrupt].map((m) => m.close()));

async function measure(
  machine: Machine,
  options: RunOptions,
  began: number,
  progress: (text: string) => void,
): Promise<Outcome> {
  options.recording?.head({
    memoryMiB: options.memoryMiB,
    ...{ machine: machine.name, workload: options.workload.text },
  });
  await machine.resume();
  const resumed = nowMs();
  const samples: RunResult["samples"][number][] = [];
  const sampler = setInterval(() => {
    samples.push(sample(machine, options, nowMs() - resumed));
    const pinning = backgroundText(machine.pins);
    if (pinning !== undefined) progress(pinning);
  }, SAMPLE_MS);
  try {
    progress("booting the guest");
    const { kernel, userspaceAt } = await machine.boot();
    progress(`running ${options.workload.text}`);
    const worked = await machine.work(options.workload);
    const pins = pinsOf(machine, options);
    const final = await machine.shutDown();
    clearInterval(sampler);
    const end = await machine.close();
    const { policy } = machine.operator;
    const ifRemapping = (n: number | undefined) => (isRemapping(options.strategy) ? (n ?? null) : null);
    const result: RunResult = {
      schema: "coiommu.run/1",
      host: machine.host,
      guest: { machine: machine.name, memoryMiB: options.memoryMiB, cpus: options.cpus, kernel },
      strategy: options.strategy,
      policy: policy?.name ?? null,
      policyParameters: policy?.parameters ?? null,
      intervalMs: policy && machine.pins.passInterval / 1e6,
      pinner: options.strategy === "none" ? null : options.pinner,
      device: options.device ? formatBdf(options.device.bdf) : null,
      seed: null,
      creation: {
        pinMs: round(machine.started.pinMs),
        toFirstInstructionMs: round(resumed - began),
        toUserspaceMs: round(userspaceAt / 1e6 - began),
      },
      workload: worked.workload,
      maps: {
        map: final?.map ?? null,
        unmap: final?.unmap ?? null,
        framesMapped: final?.framesMapped ?? null,
        framesUnmapped: final?.framesUnmapped ?? null,
        liveAtEnd: final?.live ?? null,
        mapRequests: ifRemapping(final?.mapRequests),
        unmapRequests: ifRemapping(final?.unmapRequests),
        exits: ifRemapping(final?.exits),
      },
      steady: steadyOf(worked, options),
      pins,
      kernel: kernelOf(machine, options, end),
      dma: dmaOf(machine),
      samples,
    };
    return { result, complaints: complaintsOf(result, end, options) };
  } finally {
    clearInterval(sampler);
  }
}

function complaintsOf(
  { workload, dma }: RunResult,
  { hostErrors }: MachineEnd,
  options: RunOptions,
): string[] {
  const complaints = hostErrors.map(
    ([errno, times]) => `the host refused ${times} accesses to the disk image ${options.disk.file}: ${errno}`,
  );
  if (workload.errors > 0) complaints.push(`the workload met ${workload.errors} errors`);
  if (workload.verified === false) complaints.push("what the workload wrote is not what it read back");
  if (dma.faults) complaints.push(`the assigned devices met ${dma.faults} DMA faults`);
  return complaints;
}

function steadyOf({ first, last }: Worked, { strategy }: RunOptions): RunResult["steady"] {
  if (!first || !last) return null;
  const remapping = isRemapping(strategy);
  const remapped = ({ mapRequests, unmapRequests }: DriverState) => mapRequests + unmapRequests;
  return {
    maps: last.map - first.map,
    pinRequests: remapping ? null : last.pinRequests - first.pinRequests,
    remapRequests: remapping ? remapped(last) - remapped(first) : null,
    exits: remapping ? last.exits - first.exits : null,
  };
}

export const dmaOf = ({ devices }: Pick<Machine, "devices">): RunResult["dma"] =>
  devices.length > 0
    ? sums(["transfers", "bytes", "faults"], devices)
    : { transfers: null, bytes: null, faults: null };

function sample({ pins }: Machine, { strategy }: RunOptions, ms: number): RunResult["samples"][number] {
  const tracked = strategy === "coiommu";
  return {
    ms: Math.round(ms),
    pinned: pins.framesNow,
    mapped: tracked ? pins.framesMapped : null,
    requests: tracked ? pins.pinRequests : null,
  };
}

export function pinsOf(
  machine: Pick<Machine, "pins" | "iommuTable" | "operator">,
  { strategy }: Pick<RunOptions, "strategy">,
): RunResult["pins"] {
  const { pins } = machine;
  const tracked = strategy === "coiommu";
  return {
    requests: tracked ? pins.pinRequests : null,
    refused: tracked ? pins.pinRequestsRefused : null,
    framesPinned: pins.framesPinned,
    framesUnpinned: pins.framesUnpinned,
    framesFirmware: hasDriver(strategy) ? pins.framesFirmware : null,
    framesFaulted: tracked ? pins.framesFaulted : null,
    framesCameBack: tracked ? pins.framesCameBack : null,
    framesSpeculative: tracked ? pins.framesSpeculative : null,
    speculation: tracked ? speculationOf(machine.operator.speculation, pins) : null,
    framesPeak: pins.framesPeak,
    framesMean: round(meanPinned(pins, monotonicClock.now())),
    framesAtEnd: pins.framesNow,
    ...claimsOf(machine, { strategy }),
    quotaFrames: Number.isFinite(pins.quota) ? pins.quota : null,
  };
}

export function kernelOf(
  machine: Pick<Machine, "pins" | "started">,
  { strategy }: Pick<RunOptions, "strategy">,
  { backend }: MachineEnd,
): RunResult["kernel"] {
  const before = backend.kernelPagesBefore;
  if (strategy === "none" || before === null)
    return { pinnedPagesPeak: null, source: "none", mappings: null };
  return {
    pinnedPagesPeak: machine.pins.kernelPagesPeak - before,
    source: machine.started.kernelSource,
    mappings: mappingsOf(machine.pins),
  };
}

const mappingsOf = ({ mappingsMax: max, mappingsPeak: peak, framesBeyondNeedPeak }: TrackingCounters) =>
  max === 0 ? null : { peak, limit: Number.isFinite(max) ? max : null, framesBeyondNeedPeak };

const nowMs = (): number => monotonicClock.now() / 1e6;
const round = (n: number): number => Math.round(n * 1000) / 1000;
