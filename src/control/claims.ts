import { countUnused } from "../tracking/software-iommu.ts";
import type { Machine } from "./machine.ts";
import { hasDriver, type Strategy } from "./strategy.ts";

/** What a guest has asked for, and whether it uses it; null where it asks for nothing. */
export interface Claims {
  /** Frames that are pinned because its driver asked, and not only because a device touched them. */
  readonly framesClaimed: number | null;
  /**
   * Of them, those that no assigned device has reached since. Null also when one was assigned whose DMA our IOMMU does not
   * see.
   */
  readonly framesNeverTransferred: number | null;
}

/** Reads shared memory: the backend does not notice. The two may be of different moments, as any two counters. */
export function claimsOf(
  { pins, iommuTable }: Pick<Machine, "pins" | "iommuTable">,
  { strategy }: { readonly strategy: Strategy },
): Claims {
  if (!hasDriver(strategy)) return { framesClaimed: null, framesNeverTransferred: null };
  return {
    framesClaimed: pins.framesClaimed,
    framesNeverTransferred: pins.dmaUnseen ? null : countUnused(iommuTable),
  };
}
