import type { Nanoseconds } from "./units.ts";

/** Time is an argument: host/ implements it with the monotonic clock, tests and the simulator with a number. */
export interface Clock {
  now(): Nanoseconds;
}
