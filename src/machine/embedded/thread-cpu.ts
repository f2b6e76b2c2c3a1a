import type { Cpu } from "../../driver/cpu.ts";
import { monotonicClock } from "../../host/clock.ts";
import { SharedWords } from "../../memory/shared-words.ts";

/** Long enough for a thread that runs on another core to answer. */
const SPINS = 200;
/** Then others may need this core: the host has fewer cores than the guest has CPUs and devices. */
const NAP_MS = 0.05;

/** A guest CPU that is a thread of the host. */
export class ThreadCpu implements Cpu {
  readonly #nothing = new SharedWords(new SharedArrayBuffer(4));

  waitFor(done: () => boolean, timeout: number): boolean {
    for (let spins = 0; spins < SPINS; spins++) if (done()) return true;
    const deadline = monotonicClock.now() + timeout;
    do {
      this.#nothing.wait(0, 0, NAP_MS);
      if (done()) return true;
    } while (monotonicClock.now() < deadline);
    return false;
  }
}
