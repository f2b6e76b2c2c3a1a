import { InvariantViolation } from "../base/errors.ts";
import type { Nanoseconds } from "../base/units.ts";
import { type StepKind, type Turn, Violation } from "./turn.ts";
import { type Actor, NOWHERE, type Turns } from "./turns.ts";

/** Thrown to leave a process's code between two of its steps. Not an Error, so that nobody takes it for one. */
const SUSPEND = { suspended: true };

/** An operation of a process: code that takes steps, and what follows, which takes none and is run once. */
export interface Operation {
  run(): unknown;
  settle(outcome: { readonly value: unknown } | { readonly error: unknown }): void;
}

/** An actor whose code is run again to be resumed. */
export class Process implements Actor, Turn {
  readonly name: string;
  readonly #turns: Turns;
  /** The next operation, when there is none; undefined: nothing to do now. */
  readonly #nextOperation: () => Operation | undefined;
  /** What its code changes beside shared memory: put back before the code runs again. */
  readonly #private: readonly Float64Array[];
  #saved: Float64Array[] = [];
  #operation: Operation | undefined;
  readonly #kinds: StepKind[] = [];
  readonly #results: unknown[] = [];
  #at = 0;
  #granted = false;
  #leaving = false;
  #blockedAt = -1;
  #wait: { mark: number; until: number } | undefined;
  #until: (() => boolean) | undefined;
  result: unknown;

  constructor(
    name: string,
    turns: Turns,
    nextOperation: () => Operation | undefined,
    state: readonly Float64Array[] = [],
  ) {
    this.name = name;
    this.#turns = turns;
    this.#nextOperation = nextOperation;
    this.#private = state;
  }

  /** The operation under way, as far as it has come: with shared memory, all that its future depends on. */
  get position(): string {
    return this.#results.map((r) => (typeof r === "object" ? JSON.stringify(r) : String(r))).join();
  }

  /** Operations begun. */
  operations = 0;

  get busy(): boolean {
    return this.#operation !== undefined;
  }

  /** Give up the operation under way: the machine has been reset. */
  abandon(): void {
    this.#operation = undefined;
    this.#blockedAt = -1;
    this.#wait = this.#until = undefined;
  }

  ready(): boolean {
    if (this.#operation === undefined) this.#begin();
    if (this.#operation === undefined) return false;
    if (this.#until) return this.#until();
    if (this.#blockedAt < 0) return true;
    return this.#blockedAt !== this.#turns.changes || this.#turns.time >= this.wakeAt;
  }

  get wakeAt(): number {
    return this.#blockedAt < 0 ? Number.POSITIVE_INFINITY : this.#wait!.until;
  }

  #begin(): void {
    this.#operation = this.#nextOperation();
    this.#kinds.length = this.#results.length = 0;
    this.#wait = undefined;
    if (!this.#operation) return;
    this.operations++;
    this.#saved = this.#private.map((state) => state.slice());
  }

  resume(): void {
    const operation = this.#operation!;
    this.#private.forEach((state, i) => void state.set(this.#saved[i]!));
    this.#at = 0;
    this.#granted = true;
    this.#leaving = false;
    this.#blockedAt = -1;
    this.#until = undefined;
    let outcome: Parameters<Operation["settle"]>[0];
    try {
      outcome = { value: operation.run() };
    } catch (error) {
      if (error === SUSPEND) return;
      if (error instanceof Violation || error instanceof InvariantViolation) throw error;
      outcome = { error };
    }
    this.abandon();
    this.#turns.changes++;
    operation.settle(outcome);
  }

  enter(kind: StepKind, place = NOWHERE): boolean {
    if (this.#leaving) throw SUSPEND;
    if (this.#at < this.#results.length) {
      if (this.#kinds[this.#at] !== kind)
        throw new InvariantViolation(`${this.name} does not do the same again: ${kind}`);
      this.result = this.#results[this.#at++];
      return true;
    }
    if (this.#granted) this.#granted = false;
    else {
      this.#turns.arrive(this, place);
      const next = this.#turns.pick();
      if (next !== this) this.#leave(next);
    }
    this.#turns.step(place);
    this.#kinds.push(kind);
    return false;
  }

  done<T>(result: T): T {
    this.#results.push(result);
    this.#at++;
    return result;
  }

  changed(): void {
    this.#turns.changes++;
  }

  until(condition: () => boolean): void {
    if (this.#leaving) throw SUSPEND;
    if (condition()) return;
    this.#until = condition;
    this.#leave(undefined);
  }

  /** A look that finds nothing is forgotten, so that waiting costs no more the longer it takes. */
  waitFor(done: () => boolean, timeout: Nanoseconds): boolean {
    if (this.#leaving) throw SUSPEND;
    const mark = this.#at;
    if (this.#kinds[mark] === TIMED_OUT && mark < this.#results.length) {
      this.#at++;
      return false;
    }
    if (done()) return true;
    this.#kinds.length = this.#results.length = this.#at = mark;
    if (this.#wait?.mark !== mark) this.#wait = { mark, until: this.#turns.time + timeout };
    if (this.#turns.time >= this.#wait.until) {
      this.#kinds.push(TIMED_OUT);
      this.#results.push(false);
      this.#at++;
      return false;
    }
    this.#blockedAt = this.#turns.changes;
    this.#leave(undefined);
  }

  #leave(next: Actor | undefined): never {
    if (next) this.#turns.handTo(next);
    this.#leaving = true;
    throw SUSPEND;
  }
}

const TIMED_OUT: StepKind = "timed out";
