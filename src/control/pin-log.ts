import type { Gfn, Nanoseconds } from "../base/units.ts";
import { type Claim, isGone } from "../policy/policy.ts";
import type { PinObserver } from "../tracking/pins.ts";
import { EventLogWriter } from "../wire/event-log.ts";

/** What the host pins and unpins, for a recording. */
export class PinLog implements PinObserver {
  readonly #log: EventLogWriter;

  constructor(began: number, write: (lines: string) => void) {
    this.#log = new EventLogWriter(began, write);
  }

  pinned(gfn: Gfn, now: Nanoseconds): void {
    this.#log.addFrame(gfn, "pinned", now);
  }
  tried(gfn: Gfn, outcome: Claim, now: Nanoseconds): void {
    if (isGone(outcome)) this.#log.addFrame(gfn, "unpinned", now);
  }
  flush(): void {
    this.#log.flush();
  }
}
