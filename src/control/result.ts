import os from "node:os";
import type { Strategy } from "./strategy.ts";

/** `coiommu run --json`: one object per run. A field that a strategy does not have is null, never 0. */
export interface RunResult {
  readonly schema: "coiommu.run/1";
  readonly host: {
    readonly cpus: number;
    readonly memoryMiB: number;
    readonly kernel: string;
    readonly node: string;
    readonly qemu: string | null;
    readonly accel: string | null;
  };
  readonly guest: {
    readonly machine: "qemu" | "embedded";
    readonly memoryMiB: number;
    readonly cpus: number;
    readonly kernel: string | null;
  };
  readonly strategy: Strategy;
  readonly policy: string | null;
  readonly policyParameters: Readonly<Record<string, number | string>> | null;
  /** Time between unpin passes at the end; null where there are none. */
  readonly intervalMs: number | null;
  readonly pinner: string | null;
  /** The real function that the guest used, as BDF; null for models of ours. */
  readonly device: string | null;
  readonly seed: null;
  readonly creation: {
    readonly pinMs: number;
    readonly toFirstInstructionMs: number;
    readonly toUserspaceMs: number;
  };
  readonly workload: WorkloadResult;
  /** Counted by the guest driver. */
  readonly maps: {
    readonly map: number | null;
    readonly unmap: number | null;
    readonly framesMapped: number | null;
    readonly framesUnmapped: number | null;
    readonly liveAtEnd: number | null;
    /** To the virtio-iommu: of a guest whose functions are remapped. */
    readonly mapRequests: number | null;
    readonly unmapRequests: number | null;
    /** How often the guest was left for them; one may be for many. */
    readonly exits: number | null;
  };
  /** What the workload asked for after its first second: the steady state. Null without a guest driver. */
  readonly steady: {
    readonly maps: number;
    readonly pinRequests: number | null;
    /** MAP and UNMAP. */
    readonly remapRequests: number | null;
    readonly exits: number | null;
  } | null;
  readonly pins: {
    readonly requests: number | null;
    readonly refused: number | null;
    readonly framesPinned: number;
    readonly framesUnpinned: number;
    /** Pinned because firmware or a device touched them before the guest's driver was active. */
    readonly framesFirmware: number | null;
    /** Pinned because a fault-capable device touched them. */
    readonly framesFaulted: number | null;
    /** Unpinned, and asked for again within an interval between passes. */
    readonly framesCameBack: number | null;
    /** Pinned beside what was asked for, because it was likely to be next. */
    readonly framesSpeculative: number | null;
    readonly speculation: SpeculationResult | null;
    readonly framesPeak: number;
    readonly framesMean: number;
    readonly framesAtEnd: number;
    /** Of them, what the guest's driver asked for, and what of that no device has reached since. */
    readonly framesClaimed: number | null;
    readonly framesNeverTransferred: number | null;
    readonly quotaFrames: number | null;
  };
  readonly kernel: {
    readonly pinnedPagesPeak: number | null;
    readonly source: "VmPin" | "VmLck" | "none";
    readonly mappings: MappingsResult | null;
  };
  /** Counted by the assigned devices; null where none of them is ours. */
  readonly dma: {
    readonly transfers: number | null;
    readonly bytes: number | null;
    readonly faults: number | null;
  };
  /** `mapped` is what the last unpin pass saw; null without one. */
  readonly samples: readonly {
    readonly ms: number;
    readonly pinned: number;
    readonly mapped: number | null;
    readonly requests: number | null;
  }[];
}

/** Mappings of an IOMMU; null without one. */
export interface MappingsResult {
  readonly peak: number;
  /** Null for none. */
  readonly limit: number | null;
  /** Most frames that were pinned only because they share a mapping with others. */
  readonly framesBeyondNeedPeak: number;
}

export interface SpeculationResult {
  readonly name: string;
  readonly parameters: Readonly<Record<string, number | string>>;
  /** Frames that the guest has used since, and frames that were unpinned before it did. */
  readonly saved: number;
  readonly wasted: number;
  /** Why it has switched itself off; null if it has not. */
  readonly stopped: string | null;
}

export interface WorkloadResult {
  readonly name: string;
  readonly options: Readonly<Record<string, string | number>>;
  readonly ops: number | null;
  readonly iops: number | null;
  readonly bytesPerSecond: number | null;
  readonly latencyUs: { readonly p50: number; readonly p99: number } | null;
  /** Whether what was read is what was written, or on a disk that is only read what was read first; null: neither. */
  readonly verified: boolean | null;
  readonly errors: number;
}

export interface CompareResult {
  readonly schema: "coiommu.compare/1";
  readonly host: RunResult["host"];
  readonly runs: readonly RunResult[];
}

/** `coiommu attach --json`. */
export interface AttachResult {
  readonly schema: "coiommu.attach/1";
  readonly host: RunResult["host"];
  readonly guest: { readonly memoryMiB: number };
  readonly assigned: readonly string[];
  readonly policy: string;
  readonly policyParameters: Readonly<Record<string, number | string>>;
  readonly intervalMs: number;
  readonly pinner: string;
  readonly attachedMs: number;
  readonly pins: RunResult["pins"];
  readonly kernel: RunResult["kernel"];
  /** Counted by our disks; null without one. */
  readonly dma: RunResult["dma"] | null;
}

export const describeHost = (qemu: string | null, accel: string | null): RunResult["host"] => ({
  cpus: os.cpus().length,
  memoryMiB: Math.round(os.totalmem() / 2 ** 20),
  kernel: os.release(),
  node: process.versions.node,
  qemu,
  accel,
});
