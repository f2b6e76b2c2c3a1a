import type { Gfn } from "../base/units.ts";
import type { Tracker } from "../tracking/tracker.ts";
import type { FakeHost } from "./fake-host.ts";

/**
 * The balloon of a machine, as src/control/balloon.ts has it: a frame that the guest puts into it loses its memory, with
 * nobody asked, and comes back when the backend has found no pin of it any more.
 */
export class Balloon {
  readonly #host: FakeHost;
  readonly #order: (order: (tracker: Tracker) => void) => void;
  readonly #wanted = new Set<Gfn>();
  readonly #granted = new Set<Gfn>();
  #ordered = false;
  /** Unpin passes that had ended when a sweep was ordered last. */
  #passes = -1;
  returns = 0;

  constructor(host: FakeHost, order: (order: (tracker: Tracker) => void) => void) {
    this.#host = host;
    this.#order = order;
  }

  put(gfn: Gfn): void {
    this.#host.discard(gfn);
  }

  /** The guest is to have a frame back. */
  want(gfn: Gfn): void {
    this.#wanted.add(gfn);
    this.#orderSweep();
  }

  /** Whether the guest has the frame back: then it uses it. */
  take(gfn: Gfn): boolean {
    if (!this.#granted.delete(gfn)) return false;
    this.#host.touch(gfn);
    this.returns++;
    return true;
  }

  /** The machine is reset: nothing is in it. */
  reset(): void {
    this.#wanted.clear();
    this.#granted.clear();
  }

  /** The backend has lost its orders. */
  backendDied(): void {
    this.#ordered = false;
    this.#passes = -1;
  }

  /** The backend has finished a piece of work. What could not be unpinned may be when another pass has ended. */
  between(passes: number): void {
    if (this.#wanted.size === 0 || passes === this.#passes) return;
    this.#passes = passes;
    this.#orderSweep();
  }

  #orderSweep(): void {
    if (this.#ordered) return;
    this.#ordered = true;
    this.#order((tracker) => this.#sweep(tracker));
  }

  #sweep(tracker: Tracker): void {
    const wanted = [...this.#wanted];
    const stayed = new Set<Gfn>();
    for (let from: number | null = 0; from !== null; ) {
      const range = { first: 0, end: Number.POSITIVE_INFINITY, from, discarded: true };
      const slice: ReturnType<Tracker["unpinIdle"]> = tracker.unpinIdle(range);
      for (const gfn of slice.stayed) stayed.add(gfn);
      from = slice.next;
    }
    this.#ordered = false;
    for (const gfn of wanted) if (!stayed.has(gfn) && this.#wanted.delete(gfn)) this.#granted.add(gfn);
  }
}
