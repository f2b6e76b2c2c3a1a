import { DmaFault, NotGuestRam, ProtocolError } from "../base/errors.ts";
import { type Chain, MalformedChain, type SplitQueue } from "../virtio/queue.ts";

/**
 * Does what a chain asks and returns how many bytes it wrote to the guest, from the first writable one on. Throws
 * DmaFault when the answer cannot be delivered: the chain is then handled again after the next kick.
 */
export type ChainHandler = (chain: Chain) => number;

export interface QueueCounters {
  /** DMA refused by the IOMMU. */
  faults: number;
  /** Chains or rings that break the rules, and requests that the host could not serve. */
  errors: number;
}

/**
 * Serves a queue until it is empty, whatever the guest put into it. A chain that was taken but could not be given
 * back, because the IOMMU forbids it, is kept and comes first the next time: nothing is lost, nothing is done twice
 * in the guest's eyes.
 */
export class QueueRunner {
  readonly #queue: SplitQueue;
  readonly #handle: ChainHandler;
  readonly #counters: QueueCounters;
  #chain: Chain | undefined;
  #written: number | undefined;
  #broken = false;

  constructor(queue: SplitQueue, handle: ChainHandler, counters: QueueCounters) {
    this.#queue = queue;
    this.#handle = handle;
    this.#counters = counters;
  }

  /** The ring itself breaks the rules; nothing more is served. */
  get broken(): boolean {
    return this.#broken;
  }

  /** Index of the first available entry that was not given back. */
  get base(): number {
    return (this.#queue.next - (this.#chain ? 1 : 0)) & 0xffff;
  }

  /**
   * Serve at most `limit` chains. `completed`: how many were given back; `interrupt`: the driver is to be told;
   * `more`: the limit was reached.
   */
  run(limit: number): { completed: number; interrupt: boolean; more: boolean } {
    let completed = 0;
    let interrupt = false;
    try {
      while (!this.#broken && completed < limit && this.#step()) completed++;
    } catch (error) {
      this.#note(error);
    }
    try {
      interrupt = completed > 0 && this.#queue.needsInterrupt();
    } catch (error) {
      this.#note(error);
      interrupt = true; // one too many harms nobody
    }
    return { completed, interrupt, more: completed === limit };
  }

  #step(): boolean {
    this.#chain ??= this.#pop();
    if (!this.#chain) return false;
    this.#written ??= this.#handle(this.#chain);
    this.#queue.push(this.#chain.head, this.#written);
    this.#chain = undefined;
    this.#written = undefined;
    return true;
  }

  #pop(): Chain | undefined {
    try {
      return this.#queue.pop();
    } catch (error) {
      if (!(error instanceof MalformedChain)) throw error;
      this.#counters.errors++;
      this.#written = 0;
      return { head: error.head, readable: [], writable: [] };
    }
  }

  #note(error: unknown): void {
    if (error instanceof DmaFault) this.#counters.faults++;
    else if (error instanceof NotGuestRam || error instanceof ProtocolError) {
      this.#counters.errors++;
      this.#broken = true;
    } else throw error;
  }
}
