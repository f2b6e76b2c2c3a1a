import type { Nanoseconds } from "../base/units.ts";

/** What the driver needs of the guest CPU that it runs on. */
export interface Cpu {
  /**
   * Spin until `done` returns true; false when `timeout` passed before. `done` is called again and again: it changes
   * nothing before it returns true.
   */
  waitFor(done: () => boolean, timeout: Nanoseconds): boolean;
}
