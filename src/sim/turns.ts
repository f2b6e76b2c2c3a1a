import type { Nanoseconds } from "../base/units.ts";

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
