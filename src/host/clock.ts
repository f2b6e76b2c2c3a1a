import type { Clock } from "../base/clock.ts";
import type { Nanoseconds } from "../base/units.ts";

/** CLOCK_MONOTONIC: the same in all threads of the host. */
export const monotonicClock: Clock = {
  now() {
    const [seconds, nanoseconds] = process.hrtime();
    return (seconds * 1e9 + nanoseconds) as Nanoseconds;
  },
};
