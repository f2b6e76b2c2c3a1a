import type { Spread } from "../compare.ts";
import type { EntriesReport } from "./entries.ts";
import type { PinCase } from "./pins.ts";

export interface VfioReport {
  readonly bench: "vfio";
  readonly kernel: string;
  readonly rounds: number;
  readonly pins: readonly PinCase[];
  readonly entries: EntriesReport;
  readonly creation: readonly CreationCase[];
}

/** Milliseconds until the guest's driver has its disk. */
export interface CreationCase {
  readonly memoryMiB: number;
  readonly coiommu: Spread;
  readonly static: Spread;
  /** static over coiommu, of each round. */
  readonly ratio: Spread;
  /** Only what was pinned before the guest's first instruction. */
  readonly pinMs: { readonly coiommu: Spread; readonly static: Spread };
}
