import type { Clock } from "../base/clock.ts";
import { HostError } from "../base/errors.ts";
import type { Nanoseconds } from "../base/units.ts";
import { memoryPressure } from "../host/pressure.ts";
import { splitChoice } from "../policy/parameters.ts";
import { type IntervalChoice, PassInterval } from "../policy/pass-interval.ts";
import type { UnpinPolicy } from "../policy/policy.ts";
import { createPolicy, reconfigure } from "../policy/registry.ts";
import type { Tracker, TrackingCounters } from "../tracking/tracker.ts";
import { choosePolicy, guarded, isFile } from "./policy-choice.ts";

/** When and by which policy the backend unpins, as an operator chooses. Each piece of work is a slice at most. */
export class Unpinning {
  readonly #interval: PassInterval;
  readonly #counters: TrackingCounters;
  readonly #warn: (text: string) => void;
  #choice: string;
  /** Of a policy that has failed. */
  #successor: UnpinPolicy | undefined;
  #toldPressure = false;
  #passBegan: Nanoseconds;
  #inPass = false;
  /** Time in slices of the pass under way. */
  #took = 0;

  constructor(
    o: { readonly policy: string; readonly interval: IntervalChoice },
    counters: TrackingCounters,
    now: Nanoseconds,
    warn: (text: string) => void,
  ) {
    this.#choice = o.policy;
    this.#interval = new PassInterval(o.interval);
    this.#counters = counters;
    this.#passBegan = now;
    this.#warn = warn;
    this.#show();
  }

  /** What a Tracker needs of it. */
  get ofTracker() {
    return {
      policy: this.#choose(this.#choice),
      observers: [this.#interval],
      pressure: (file: string) => this.#pressure(file),
    };
  }

  /** When work() has something to do. */
  get dueAt(): number {
    return this.#inPass ? 0 : this.#passBegan + this.#interval.now;
  }

  /** `clock`: tells `now`, and when the slice has ended. */
  work(tracker: Tracker, clock: Clock): void {
    const now = clock.now();
    if (this.#successor) tracker.setPolicy(this.#successor);
    this.#successor = undefined;
    if (now < this.dueAt) return;
    if (!this.#inPass) {
      tracker.startPass();
      this.#passBegan = now;
      this.#took = 0;
      this.#inPass = true;
      return;
    }
    this.#inPass = tracker.slice();
    this.#took += clock.now() - now;
    if (this.#inPass) return;
    this.#interval.passEnded(now, this.#took);
    this.#show();
  }

  /** The policy that is at work keeps what it knows when only its parameters change. Throws UserError. */
  setPolicy(tracker: Tracker, choice: string): void {
    const sameName = splitChoice(choice).name === splitChoice(this.#choice).name;
    if (sameName) reconfigure(tracker.policy, choosePolicy(choice));
    else tracker.setPolicy(this.#choose(choice));
    this.#choice = choice;
    this.#toldPressure = false;
  }

  setInterval(choice: IntervalChoice): void {
    this.#interval.choose(choice);
    this.#show();
  }

  #choose(choice: string): UnpinPolicy {
    const policy = choosePolicy(choice);
    if (!isFile(choice)) return policy;
    return guarded(policy, (error) => {
      this.#warn(`--policy ${choice} has failed, and policy lru takes its place: ${error}`);
      this.#choice = "lru";
      // Not inside the call that it failed in.
      this.#successor = createPolicy("lru");
    });
  }

  /** 0 where it cannot be read any more. */
  #pressure(file: string): number {
    try {
      return memoryPressure(file);
    } catch (error) {
      if (!(error instanceof HostError)) throw error;
      if (!this.#toldPressure) this.#warn(`no memory pressure is seen any more: ${error.message}`);
      this.#toldPressure = true;
      return 0;
    }
  }

  #show(): void {
    this.#counters.passInterval = this.#interval.now;
    this.#counters.framesCameBack = this.#interval.cameBack;
  }
}
