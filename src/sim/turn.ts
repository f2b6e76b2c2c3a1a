/**
 * How production code, which knows nothing of it, is run one step at a time: a step is one access to shared memory, or
 * one call of the host's kernel.
 *
 * The host is one thread, and may be in the middle of its work while others run: whoever is to run next runs on top of
 * its stack. All others are *processes*: to suspend one, an exception leaves its code, and to resume it its code runs
 * again from the start of the current operation, with the results of the steps that it has taken. That is sound because
 * everything that such code changes is shared memory, hence a step, or is put back before it runs again.
 */
import type { Nanoseconds } from "../base/units.ts";
import { NOWHERE, type Place } from "./turns.ts";

/** What a step was, to notice code that does not do the same again. */
export type StepKind = string;

/** What a checker found, or why the run cannot go on: ends it, whatever code it passes on its way up. */
export class Violation extends Error {}

/** How code that runs in an actor reports its steps. */
export interface Turn {
  /**
   * A step is about to be taken; returns when it is this actor's turn. True: it was taken before, and its result is
   * `result`. Otherwise the caller takes it, and hands the result to done().
   */
  enter(kind: StepKind, place?: Place): boolean;
  readonly result: unknown;
  done<T>(result: T): T;
  /** The step that is being taken changes something. */
  changed(): void;
  /** Wait until `condition` holds, which takes no steps, and stays true once it is. */
  until(condition: () => boolean): void;
  /** Wait until `done`, which takes steps, returns true; false when `timeout` passed before. */
  waitFor(done: () => boolean, timeout: Nanoseconds): boolean;
}

/** Take a step that has no method of its own; what it throws is its result too. Says itself whether it changes something. */
export function step<T>(turn: Turn, kind: StepKind, take: () => T, place = NOWHERE): T {
  if (turn.enter(kind, place)) {
    if (turn.result instanceof Thrown) throw turn.result.error;
    return turn.result as T;
  }
  try {
    return turn.done(take());
  } catch (error) {
    turn.done(new Thrown(error));
    throw error;
  }
}

class Thrown {
  readonly error: unknown;
  constructor(error: unknown) {
    this.error = error;
  }
}
