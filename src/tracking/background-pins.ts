import type { Clock } from "../base/clock.ts";
import { HostError } from "../base/errors.ts";
import { FRAME_SIZE, type Gfn, milliseconds, type Nanoseconds } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import { NO_TABLE } from "./ledger.ts";
import type { Pins } from "./pins.ts";

/** Frames in one slice: what a PIN request may have to wait for. */
const SLICE_FRAMES = 256;
/** A host that has refused is asked again after this time. */
const RETRY = milliseconds(1000);

/** Why it does not go on: its index is the counter `backgroundStopped`. */
export const STOPPED_BY = ["nothing", "quota", "host"] as const;

/**
 * Pins all RAM frame by frame, in slices, so that it can stop at any frame and each can be unpinned for itself once a
 * driver tracks them. What the host refuses is asked for again; what is pinned stays.
 */
export class BackgroundPins {
  readonly #memory: GuestMemory;
  readonly #pins: Pins;
  readonly #clock: Clock;
  readonly #quota: () => number;
  #rest: Iterator<Gfn>;
  /** Of the walk, but not pinned yet: the host has refused them. */
  #refused: Gfn[] = [];
  #retryAt = 0;
  #stopped: (typeof STOPPED_BY)[number] = "nothing";

  constructor(memory: GuestMemory, pins: Pins, clock: Clock, quota: () => number) {
    this.#memory = memory;
    this.#pins = pins;
    this.#clock = clock;
    this.#quota = quota;
    this.#rest = memory.frames()[Symbol.iterator]();
  }

  /** Frames of RAM. */
  get frames(): number {
    return this.#memory.size / FRAME_SIZE;
  }
  get complete(): boolean {
    return this.#pins.ledger.size === this.frames;
  }
  get stopped(): (typeof STOPPED_BY)[number] {
    return this.#stopped;
  }

  /** From the start: there is other RAM, or frames were unpinned since. */
  restart(): void {
    this.#rest = this.#memory.frames()[Symbol.iterator]();
    this.#refused = [];
    this.#retryAt = 0;
    this.#stopped = "nothing";
  }

  /** When there is something to do; Infinity once all is pinned. */
  get dueAt(): Nanoseconds {
    return (this.complete ? Number.POSITIVE_INFINITY : this.#retryAt) as Nanoseconds;
  }

  /** Pin some more; returns how many. Throws HostError: then none of them is. */
  slice(): number {
    // A part of RAM is of no use to a device that may touch any of it, and leaves no room for what it does touch.
    if (this.frames + this.#pins.abandoned > this.#quota()) return this.#stop("quota");
    // A set, because the walk may have begun anew and come to what was refused.
    const wanted = new Set(this.#refused.filter((gfn) => !this.#pins.ledger.has(gfn)));
    for (let n = 0; n < SLICE_FRAMES && wanted.size < SLICE_FRAMES; n++) {
      const { done, value } = this.#rest.next();
      if (done) {
        this.#rest = this.#memory.frames()[Symbol.iterator]();
        break;
      }
      if (!this.#pins.ledger.has(value)) wanted.add(value);
    }
    const gfns = [...wanted];
    try {
      this.#pins.pin(gfns, NO_TABLE);
    } catch (error) {
      if (!(error instanceof HostError)) throw error;
      this.#refused = gfns;
      this.#stop("host");
      throw error;
    }
    this.#refused = [];
    this.#stopped = "nothing";
    this.#retryAt = 0;
    return gfns.length;
  }

  #stop(by: "quota" | "host"): 0 {
    this.#stopped = by;
    this.#retryAt = this.#clock.now() + RETRY;
    return 0;
  }
}
