import { createSpeculation } from "../../src/policy/speculation/registry.ts";
import { active, type Machine, type MachineOptions } from "./machine.ts";

export const speculate = (choice: string) => ({ speculation: createSpeculation(choice) });
/** A guest with a table, of which neighbours of what it asks for are pinned too. */
export const guessing = (budget: number, options: MachineOptions = {}, complete = true): Machine =>
  active({ ...speculate(`neighbours,budget=${budget}`), ...options }, complete);

export const pinned = (m: Machine): number[] => [...m.tracker.frames()].sort((a, b) => a - b);
/** Frames pinned unasked, used since, unpinned unused. */
export const account = ({ counters: c }: Machine) => [
  c.framesSpeculative,
  c.speculationSaved,
  c.speculationWasted,
];
export const passes = (m: Machine, n: number): void => {
  for (let i = 0; i < n; i++) m.pass();
};
