import { UserError } from "../base/errors.ts";
import { listed, rangesOf } from "../base/ranges.ts";
import type { WorkerHost } from "../machine/commands.ts";
import { splitChoice } from "../policy/parameters.ts";
import type { IntervalChoice } from "../policy/pass-interval.ts";
import type { UnpinPolicy } from "../policy/policy.ts";
import { createSpeculation } from "../policy/speculation/registry.ts";
import type { IdleRange, IdleSlice } from "../tracking/unpin-passes.ts";
import { choosePolicy } from "./policy-choice.ts";
import type { Strategy } from "./strategy.ts";

export type PolicyInEffect = Pick<UnpinPolicy, "name" | "parameters">;

/** Frames that stayed are named up to this many; who needs to know more asks for smaller ranges. */
export const LISTED_MAX = 65_536;

export interface Unpinned {
  readonly unpinned: number;
  /** How many frames of the range are pinned still. */
  readonly stayed: number;
  /** Which, in ascending order; null when they are too many. */
  readonly stayedRanges: { readonly firstFrame: number; readonly frames: number }[] | null;
}

/**
 * What a person may change while a guest is live. The backend does it between requests, never longer than a slice. All
 * throw UserError for what cannot be done now.
 */
export class Operator {
  readonly #backend: WorkerHost;
  readonly #strategy: Strategy;
  #choice: string;
  #policy: PolicyInEffect;
  #interval: IntervalChoice;
  #speculation: PolicyInEffect;

  constructor(
    backend: WorkerHost,
    options: {
      readonly strategy: Strategy;
      readonly policy: string;
      readonly interval: IntervalChoice;
      readonly speculate?: string;
    },
  ) {
    this.#backend = backend;
    this.#strategy = options.strategy;
    this.#choice = options.policy;
    this.#policy = choosePolicy(options.policy);
    this.#interval = options.interval;
    this.#speculation = createSpeculation(options.speculate ?? "off");
  }

  /** Null where nothing is ever unpinned. */
  get policy(): PolicyInEffect | null {
    return this.#strategy === "coiommu" ? this.#policy : null;
  }

  /** The name, or the file, of the policy. */
  get policyName(): string {
    return splitChoice(this.#choice).name;
  }

  get interval(): IntervalChoice {
    return this.#interval;
  }

  /** Also while it has switched itself off. */
  get speculation(): PolicyInEffect {
    return this.#speculation;
  }

  /** As `--speculate` takes it; one that had switched itself off is on again. */
  async setSpeculation(choice: string): Promise<void> {
    const speculation = createSpeculation(choice);
    await this.#request("setSpeculation", choice);
    this.#speculation = speculation;
  }

  /** As `--policy` takes it. */
  async setPolicy(choice: string): Promise<void> {
    const policy = choosePolicy(choice);
    await this.#request("setPolicy", choice);
    this.#choice = choice;
    this.#policy = policy;
  }

  async setInterval(choice: IntervalChoice): Promise<void> {
    await this.#request("setInterval", choice);
    this.#interval = choice;
  }

  /** What the policy has learnt. */
  policyState(): Promise<Record<string, number>> {
    return this.#request("policyState", null);
  }

  /** Frames; Infinity for no limit. */
  setQuota(frames: number): Promise<void> {
    return this.#request("setQuota", frames);
  }

  park(parked: boolean): Promise<void> {
    return this.#request("park", parked);
  }

  /** Unpin what is idle of a range. Ends early when `signal` says that nobody waits for it any more. */
  async unpinIdle(range: Omit<IdleRange, "from">, signal?: AbortSignal): Promise<Unpinned> {
    let [unpinned, stayed] = [0, 0];
    const frames: number[] = [];
    for (let from: number | null = 0; from !== null && !signal?.aborted; ) {
      const what: IdleRange = { ...range, from };
      const slice: IdleSlice = await this.#request<IdleSlice>("unpinIdle", what);
      unpinned += slice.unpinned;
      stayed += slice.stayed.length;
      if (stayed <= LISTED_MAX) for (const gfn of slice.stayed) frames.push(gfn);
      from = slice.next;
    }
    return { unpinned, stayed, stayedRanges: stayed > LISTED_MAX ? null : listed(rangesOf(frames)) };
  }

  async #request<T>(command: string, argument: unknown): Promise<T> {
    if (this.#strategy !== "coiommu")
      throw new UserError(`strategy ${this.#strategy} has no tracking that could be changed`, 1);
    return await this.#backend.request<T>(command, argument);
  }
}
