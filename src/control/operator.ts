import { UserError } from "../base/errors.ts";
import type { WorkerHost } from "../machine/commands.ts";
import type { UnpinPolicy } from "../policy/policy.ts";
import { createPolicy } from "../policy/registry.ts";
import type { Tracker } from "../tracking/tracker.ts";
import type { UnpinIdle } from "./host-side.ts";
import type { Strategy } from "./strategy.ts";

export type PolicyInEffect = Pick<UnpinPolicy, "name" | "parameters">;

/**
 * What a person may change while a guest is live. The backend does it between requests, never longer than a slice. All
 * throw UserError for what cannot be done now.
 */
export class Operator {
  readonly #backend: WorkerHost;
  readonly #strategy: Strategy;
  #policy: PolicyInEffect;

  constructor(backend: WorkerHost, options: { readonly strategy: Strategy; readonly policy: string }) {
    this.#backend = backend;
    this.#strategy = options.strategy;
    this.#policy = createPolicy(options.policy);
  }

  /** Null where nothing is ever unpinned. */
  get policy(): PolicyInEffect | null {
    return this.#strategy === "coiommu" ? this.#policy : null;
  }

  /** As `--policy` takes it. */
  async setPolicy(text: string): Promise<void> {
    const policy = createPolicy(text);
    await this.#request("setPolicy", text);
    this.#policy = policy;
  }

  /** Frames; Infinity for no limit. */
  setQuota(frames: number): Promise<void> {
    return this.#request("setQuota", frames);
  }

  park(parked: boolean): Promise<void> {
    return this.#request("park", parked);
  }

  /** Unpin what is idle of [first, end). Ends early when `signal` says that nobody waits for it any more. */
  async unpinIdle(first: number, end: number, signal: AbortSignal) {
    let [unpinned, stayed] = [0, 0];
    for (let from: number | null = 0; from !== null && !signal.aborted; ) {
      const what: UnpinIdle = { first, end, from };
      const slice = await this.#request<ReturnType<Tracker["unpinIdle"]>>("unpinIdle", what);
      unpinned += slice.unpinned;
      stayed += slice.stayed;
      from = slice.next;
    }
    return { unpinned, stayed };
  }

  async #request<T>(command: string, argument: unknown): Promise<T> {
    if (this.#strategy !== "coiommu")
      throw new UserError(`strategy ${this.#strategy} has no tracking that could be changed`, 1);
    return await this.#backend.request<T>(command, argument);
  }
}
