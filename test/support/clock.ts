import type { Clock } from "../../src/base/clock.ts";
import type { Nanoseconds } from "../../src/base/units.ts";

/** Time that moves when a test says so, and by `step` with every look. */
export class FakeClock implements Clock {
  time: number;
  step: number;
  constructor(time = 0, step = 1) {
    this.time = time;
    this.step = step;
  }
  now(): Nanoseconds {
    this.time += this.step;
    return this.time as Nanoseconds;
  }
}
