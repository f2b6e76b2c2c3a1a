import { splitChoice } from "../policy/parameters.ts";
import { reconfigure } from "../policy/registry.ts";
import { createSpeculation } from "../policy/speculation/registry.ts";
import type { Speculation } from "../policy/speculation/speculation.ts";
import type { Tracker, TrackingCounters } from "../tracking/tracker.ts";
import type { SpeculationResult } from "./result.ts";

/** What the backend pins unasked, as an operator chooses. */
export class Speculating {
  #choice: string;
  readonly #warn: (text: string) => void;

  constructor(choice: string, warn: (text: string) => void) {
    this.#choice = choice;
    this.#warn = warn;
  }

  /** What a Tracker needs of it. */
  get ofTracker() {
    return {
      speculation: createSpeculation(this.#choice),
      speculationStopped: (used: number, judged: number) =>
        this.#warn(`--speculate ${this.#choice} has switched itself off: ${reason(used, judged)}`),
    };
  }

  /** The one that is at work keeps what it knows when only its parameters change. Throws UserError. */
  set(tracker: Tracker, choice: string): void {
    const speculation = createSpeculation(choice);
    const sameName = splitChoice(choice).name === splitChoice(this.#choice).name;
    if (sameName) reconfigure(tracker.speculation, speculation);
    tracker.setSpeculation(sameName ? tracker.speculation : speculation);
    this.#choice = choice;
  }
}

const reason = (used: number, judged: number): string =>
  `of the last ${judged} frames that it pinned, the guest used ${used}`;

/** What it is, and what has come of it. */
export function speculationOf(
  { name, parameters }: Pick<Speculation, "name" | "parameters">,
  pins: TrackingCounters,
): SpeculationResult {
  return {
    ...{ name, parameters, saved: pins.speculationSaved, wasted: pins.speculationWasted },
    stopped: pins.speculationStopped ? reason(pins.speculationUsed, Number(parameters.judged)) : null,
  };
}
