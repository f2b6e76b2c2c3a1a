import { InvariantViolation } from "../base/errors.ts";
import type { StepKind, Turn } from "./turn.ts";
import { type Actor, NOWHERE, type Turns } from "./turns.ts";

export interface HostHooks {
  /** Called at each step of the host: throws to kill it there. */
  interrupt?(): void;
  /** Told of each step's result. */
  took?(result: unknown): void;
}

/** The host's turn: whoever is chosen before its next step runs on top of it. */
export class HostTurn implements Turn {
  readonly #turns: Turns;
  readonly #host: Actor;
  readonly #hooks: HostHooks;
  /** Off: what the host does is no step, as when it starts. */
  on = false;
  readonly result = undefined;

  constructor(turns: Turns, host: Actor, hooks: HostHooks) {
    this.#turns = turns;
    this.#host = host;
    this.#hooks = hooks;
  }

  enter(_kind: StepKind, place = NOWHERE): boolean {
    if (!this.on) return false;
    this.#turns.arrive(this.#host, place);
    for (;;) {
      const next = this.#turns.pick();
      if (next === undefined) throw new InvariantViolation("nobody is ready, and the host is at work");
      if (next === this.#host) break;
      next.resume();
    }
    this.#turns.step(place);
    this.#hooks.interrupt?.();
    return false;
  }

  done<T>(result: T): T {
    if (this.on) this.#hooks.took?.(result);
    return result;
  }
  changed(): void {
    this.#turns.changes++;
  }
  until(): never {
    this.waitFor();
  }
  waitFor(): never {
    throw new InvariantViolation("the host waits for nobody");
  }
}
