/**
 * How production code, which knows nothing of it, is run one step at a time: a step is one access to shared memory, or
 * one call of the host's kernel.
 *
 * The host is one thread, and may be in the middle of its work while others run: whoever is to run next runs on top of
 * its stack. All others are *processes*: to suspend one, an exception leaves its code, and to resume it its code runs
 * again from the start of the current operation, with the results of the steps that it has taken. That is sound because
 * everything that such code changes is shared memory, hence a step, or is put back before it runs again.
 */
import { InvariantViolation } from "../base/errors.ts";
import type { Nanoseconds } from "../base/units.ts";

/** What a step was, to notice code that does not do the same again. */
export type StepKind = string;

/** What a checker found, or why the run cannot go on: ends it, whatever code it passes on its way up. */
export class Violation extends Error {}

/** A part of the world that takes steps. */
export interface Actor {
  readonly name: string;
  /** Whether it has something to do now. */
  ready(): boolean;
  /** When it has, at the latest; Infinity when only others can change that. */
  readonly wakeAt: number;
  /** Take steps until the schedule gives the turn to somebody else, or there is nothing to do. */
  resume(): void;
}

/** Decides who takes the next step. */
export interface Schedule {
  /** One of 0 … width-1; `current` is who took the last step, or -1. */
  choose(width: number, current: number): number;
  /** Whether whoever is about to touch a place lets others go first, until one of them has touched it too. */
  holdsBack(): boolean;
}

/** What a step touches: a word, a frame. Two steps that touch the same may be the two sides of a race. */
export type Place = number;
export const NOWHERE: Place = -1;
const SEVERAL = "several";
/** At most so many steps of others. */
const HOLD_STEPS = 150;
/** And so much of their time, in ns. */
const HOLD_TIME = 2e6;

/** Thrown to leave a process's code between two of its steps. Not an Error, so that nobody takes it for one. */
const SUSPEND = { suspended: true };

/** Time, steps, and whose turn it is. */
export class Turns {
  readonly actors: Actor[] = [];
  readonly #schedule: Schedule;
  readonly #stepTime: number;
  /** Called before each step: throws to end the run. */
  readonly #beforeStep: () => void;
  /** Nanoseconds since the world began. */
  time = 0 as Nanoseconds;
  steps = 0;
  /** Steps so far that may have changed what another actor waits for. */
  changes = 0;
  #next: Actor | undefined;
  #last: Actor | undefined;
  readonly #visitors = new Map<Place, Actor | typeof SEVERAL>();
  #held: Actor | undefined;
  #heldAt: Place = NOWHERE;
  #heldUntil = { steps: 0, time: 0 };
  readonly #ready: Actor[] = [];

  constructor(options: { schedule: Schedule; stepTime: number; beforeStep: () => void }) {
    this.#schedule = options.schedule;
    this.#stepTime = options.stepTime;
    this.#beforeStep = options.beforeStep;
  }

  /** Who takes the next step; time goes on to when somebody is ready. Undefined: nobody ever will be. */
  pick(): Actor | undefined {
    const next = this.#next;
    this.#next = undefined;
    if (next) return next;
    for (;;) {
      const ready = this.#ready;
      ready.length = 0;
      for (const actor of this.actors) if (actor !== this.#held && actor.ready()) ready.push(actor);
      if (ready.length > 0) {
        const choice = ready.length === 1 ? 0 : this.#schedule.choose(ready.length, this.#current());
        this.#last = ready[choice]!;
        return this.#last;
      }
      let wakeAt = Number.POSITIVE_INFINITY;
      for (const actor of this.actors) if (actor !== this.#held) wakeAt = Math.min(wakeAt, actor.wakeAt);
      if (this.#held && wakeAt > this.#heldUntil.time) {
        this.#held = undefined;
        continue;
      }
      if (wakeAt === Number.POSITIVE_INFINITY) return undefined;
      this.time = Math.max(this.time, wakeAt) as Nanoseconds;
    }
  }

  /** Who takes the step under way. */
  get current(): Actor | undefined {
    return this.#last;
  }

  #current(): number {
    return this.#last ? this.#ready.indexOf(this.#last) : -1;
  }

  /** Whose turn it is now is not the one who asked: it comes when that one has left. */
  handTo(actor: Actor): void {
    this.#next = actor;
  }

  /** `actor` is about to touch `place`. Only where others have been too there can be a race. */
  arrive(actor: Actor, place: Place): void {
    if (place === NOWHERE) return;
    const visitor = this.#visitors.get(place);
    if (visitor === undefined) this.#visitors.set(place, actor);
    else if (visitor !== actor) this.#visitors.set(place, SEVERAL);
    if (visitor === undefined || visitor === actor || this.#held || !this.#schedule.holdsBack()) return;
    this.#held = actor;
    this.#heldAt = place;
    this.#heldUntil = { steps: this.steps + HOLD_STEPS, time: this.time + HOLD_TIME };
  }

  step(place: Place): void {
    this.#beforeStep();
    if (this.#held && (place === this.#heldAt || this.steps >= this.#heldUntil.steps)) this.#held = undefined;
    this.steps++;
    this.time = (this.time + this.#stepTime) as Nanoseconds;
  }
}

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
