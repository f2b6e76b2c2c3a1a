import type { Random } from "../base/random.ts";
import { milliseconds } from "../base/units.ts";
import type { GuestRegion } from "../memory/guest-memory.ts";
import type { TrackingCounters } from "../tracking/tracker.ts";
import type { Checks } from "./checks.ts";
import type { Guest } from "./guest.ts";
import type { Settings } from "./settings.ts";
import { Violation } from "./turn.ts";
import type { Turns } from "./turns.ts";

export const AT_ONCE = { activationTimeout: Number.POSITIVE_INFINITY, driverComes: 0 } as const;

/** What half of the machines have instead of a driver that is there at once. */
export function lifeOf(next: Random, { quota, backendDies }: Settings): Partial<Settings> {
  if (next(2) > 0) return AT_ONCE;
  // A driver waits for seconds for the answer of one that is dead, and every harvest meanwhile would look at all RAM.
  const backend = backendDies > 0 ? { harvestInterval: Number.POSITIVE_INFINITY } : {};
  const activationTimeout = (1 + next(10)) / 5;
  const before = next(4) === 0 ? ({ beforeActivation: "all" } as const) : {};
  if (quota < Number.POSITIVE_INFINITY || next(3) === 0)
    return { activationTimeout, driverComes: next(20) / 5, ...backend, ...before };
  // Mostly with a host in which nothing fails, so that it can be told when it must have pinned all.
  const host = next(3) > 0 ? { pinFails: 0, backendDies: 0 } : backend;
  return { activationTimeout, driverComes: "when all is pinned", ...host, ...before };
}

/** How long the backend may take to pin all RAM, in ns: nothing stands in its way but schedules that hold it back. */
const ALL_PINNED_WITHIN = 100e6;

/** When a machine's driver is loaded, and what holds for devices that are at work before. */
export class DriverArrival {
  readonly #settings: Settings;
  readonly #turns: Turns;
  readonly #checks: Checks;
  readonly #counters: TrackingCounters;
  readonly #regions: readonly GuestRegion[];
  #poweredOn = 0;
  #wasComplete = false;
  /** How often all RAM got pinned, because no driver was there. */
  timesPinned = 0;

  constructor(o: {
    readonly settings: Settings;
    readonly turns: Turns;
    readonly checks: Checks;
    readonly counters: TrackingCounters;
    readonly regions: readonly GuestRegion[];
  }) {
    this.#settings = o.settings;
    this.#turns = o.turns;
    this.#checks = o.checks;
    this.#counters = o.counters;
    this.#regions = o.regions;
  }

  /** The machine is reset. */
  powerOn(): void {
    this.#poweredOn = this.#turns.time;
  }

  mayBoot({ draining, needsRestart }: Guest): boolean {
    const { driverComes, activationTimeout, hostile, pinFails, operator, mappings } = this.#settings;
    // A backend that starts in place of one that died leaves the guest as it is.
    if (draining || needsRestart) return true;
    const passed = this.#turns.time - this.#poweredOn;
    if (driverComes !== "when all is pinned") return passed >= milliseconds(driverComes);
    const scarce = mappings > 0 && mappings < Number.POSITIVE_INFINITY;
    const hindered = hostile || pinFails > 0 || operator > 0 || scarce;
    const allPinned = this.allPinned();
    if (!allPinned && !hindered && passed > milliseconds(activationTimeout) + ALL_PINNED_WITHIN)
      throw new Violation("no driver was there in time, and not all RAM is pinned");
    return allPinned;
  }

  /** The host says so, and it is. */
  allPinned(): boolean {
    return this.#saidComplete() && this.#checks.allHeld(this.#regions);
  }

  /** The backend has finished a piece of work. */
  check(): void {
    const complete = this.#saidComplete();
    if (complete) this.#checks.saidComplete(this.#regions);
    if (complete && !this.#wasComplete) this.timesPinned++;
    this.#wasComplete = complete;
  }

  #saidComplete(): boolean {
    const { backgroundFrames, backgroundPinned } = this.#counters;
    return backgroundFrames > 0 && backgroundPinned === backgroundFrames;
  }
}
