import { createNamed } from "../registry.ts";
import { ghost } from "./ghost.ts";
import { neighbours } from "./neighbours.ts";
import { defineSpeculation, type Speculation, type SpeculationEntry } from "./speculation.ts";
import { stride } from "./stride.ts";

const off = defineSpeculation({
  name: "off",
  summary: "pins nothing that the guest has not asked for",
  source: "for comparison",
  parameters: {},
  create: () => ({ pinned() {}, tried() {}, candidates() {} }),
});

export const speculations: readonly SpeculationEntry[] = [
  off,
  ghost,
  neighbours,
  stride,
] as readonly SpeculationEntry[];

/** From `--speculate NAME[,key=value…]`. Throws UserError for an unknown name or parameter. */
export const createSpeculation = (choice: string): Speculation =>
  createNamed(speculations, choice, "--speculate", "speculation");
