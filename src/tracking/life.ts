import type { Clock } from "../base/clock.ts";
import { milliseconds, type Nanoseconds } from "../base/units.ts";

/**
 * When may what be unpinned: the guest's life, docs/abi.md section 4, as a pure transition function.
 *
 * - undecided: no driver yet. Firmware's window and what devices touch is pinned, nothing is unpinned.
 * - tracked: the table says what is in use.
 * - frozen: the driver has gone, its devices may still write. Nothing is pinned or unpinned.
 * - static: everything is pinned, as without coIOMMU.
 */
export const LIVES = ["undecided", "tracked", "frozen", "static"] as const;
export type Life = (typeof LIVES)[number];
export type LifeEvent =
  | "pin-on"
  /** Without COMPLETE. */
  | "pin-on-incomplete"
  | "pin-off"
  | "device-reset"
  | "machine-reset"
  /** No driver has turned PIN on in time, and an assigned function masters the bus. */
  | "activation-timeout"
  /** All assigned functions have been reset, or are off the bus. */
  | "functions-reset";

/** `--before-activation`: what is pinned while the guest is undecided. */
export const BEFORE_ACTIVATION = ["bios", "all", "none"] as const;
export type BeforeActivation = (typeof BEFORE_ACTIVATION)[number];

/** The state at power-on and after a machine reset. */
export const initialLife = (before: BeforeActivation): Life => (before === "all" ? "static" : "undecided");

export function nextLife(life: Life, event: LifeEvent, before: BeforeActivation): Life {
  switch (event) {
    case "machine-reset":
      return initialLife(before);
    case "pin-on":
      return "tracked";
    case "pin-on-incomplete":
      // Functions that the table leaves out still rely on static pins.
      return life === "static" ? "static" : "tracked";
    case "activation-timeout":
      return life === "undecided" ? "static" : life;
    case "functions-reset":
      return life === "frozen" ? initialLife(before) : life;
    default:
      return life === "tracked" ? "frozen" : life;
  }
}

/** What the host knows of the assigned functions. Neither: nothing, so the guest leaves no state without its driver. */
export interface AssignedBus {
  /** One of those that rely on our pins does DMA, or may begin to. */
  mastering(): boolean;
  /** All are known to do none, and not to begin with what they were told before. */
  quiet(): boolean;
}

/** How long it may take until a change of the bus is noticed. */
const LOOK_INTERVAL = milliseconds(50);

/** The state of one guest, with the changes that its driver does not tell of. */
export class GuestLife {
  readonly #before: BeforeActivation;
  readonly #timeout: number;
  readonly #bus: AssignedBus | undefined;
  readonly #clock: Clock;
  #now: Life;
  #since: number;
  #lookAt: number;

  /** `timeout`: of the activation, in ns; Infinity for none. */
  constructor(before: BeforeActivation, timeout: number, bus: AssignedBus | undefined, clock: Clock) {
    this.#before = before;
    this.#timeout = timeout;
    this.#bus = bus;
    this.#clock = clock;
    this.#now = initialLife(before);
    this.#since = this.#lookAt = clock.now();
  }

  get now(): Life {
    return this.#now;
  }

  enter(event: LifeEvent): void {
    const next = nextLife(this.#now, event, this.#before);
    if (next !== this.#now || event === "machine-reset") this.#since = this.#lookAt = this.#clock.now();
    this.#now = next;
  }

  /** An earlier backend's guest. */
  adopted(): void {
    this.#now = "frozen";
  }

  /** When look() may find something; Infinity for never. */
  get lookAt(): Nanoseconds {
    const never = Number.POSITIVE_INFINITY as Nanoseconds;
    if (!this.#bus) return never;
    if (this.#now === "frozen") return this.#lookAt as Nanoseconds;
    if (this.#now !== "undecided") return never;
    return Math.max(this.#since + this.#timeout, this.#lookAt) as Nanoseconds;
  }

  /** What has happened that nobody tells of. */
  look(): LifeEvent | undefined {
    const now = this.#clock.now();
    if (!this.#bus || now < this.lookAt) return undefined;
    this.#lookAt = now + LOOK_INTERVAL;
    if (this.#now === "frozen") return this.#bus.quiet() ? "functions-reset" : undefined;
    return this.#bus.mastering() ? "activation-timeout" : undefined;
  }
}
