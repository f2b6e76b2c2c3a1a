import type { Nanoseconds } from "../../base/units.ts";
import { count, type Parameters, type ValuesOf } from "../parameters.ts";
import type { GfnBuffer, UnpinPolicy } from "../policy.ts";

/** A PIN request. */
export interface Asked {
  readonly ranges: readonly { readonly gfn: number; readonly nrFrames: number }[];
  /** segment << 16 | BDF. */
  readonly endpoint: number;
}

/** Most frames that are looked at for one request: those of a block of 2 MiB. */
export const CANDIDATES_MAX = 512;

/** What every speculation takes, beside parameters of its own. */
export const LIMITS = {
  budget: count("frames that are pinned beside those of one request, at most", [32, 1, CANDIDATES_MAX]),
  judged: count("of so many of them, the guest must use half, or it is switched off", [256, 1, 65_536]),
};

/**
 * Guesses what a guest is going to ask for, never whether it may be pinned. As an unpin policy it is told events and
 * time, so that simulation and the live backend run the same object.
 */
export interface Speculation extends Pick<UnpinPolicy, "name" | "parameters" | "tried"> {
  /** A frame was pinned because the guest asked, or the guest has used one that was pinned unasked. O(1). */
  readonly pinned: UnpinPolicy["pinned"];
  /** Append frames to pin with those of `asked`, the likeliest first, until `out` is full. Any frame will do. */
  candidates(asked: Asked, now: Nanoseconds, out: GfnBuffer): void;
}

/** A kind of speculation: what `coiommu policies` lists. */
export interface SpeculationEntry<P extends Parameters = Parameters> {
  readonly name: string;
  readonly summary: string;
  /** Where the idea comes from. */
  readonly source: string;
  readonly parameters: P;
  /** `values`: to be read when they are needed, because an operator may change them. */
  create(values: ValuesOf<P>): Omit<Speculation, "name" | "parameters">;
}

/** Types `create` by the parameters. */
export const defineSpeculation = <const P extends Parameters>(
  entry: SpeculationEntry<P>,
): SpeculationEntry<P> => entry;
