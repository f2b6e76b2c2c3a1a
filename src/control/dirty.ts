import { UserError } from "../base/errors.ts";
import type { WorkerHost } from "../machine/commands.ts";
import type { DirtySlice } from "../tracking/dirty.ts";

/** Commands of the backend, which HostSide serves, and their answers. */
export interface DirtyCommands {
  /** Begin to track, or begin anew. UserError where devices may write what no pin tells of. */
  dirtyStart(): null;
  /** The next slice of a harvest. UserError when dirtyStart was not given to this backend. */
  dirtyHarvest(): DirtySlice;
  dirtyStop(): null;
}

/** What the assigned devices of a machine write, for whoever copies its memory while it runs. */
export class DirtyFrames {
  readonly #backend: WorkerHost;
  #harvesting = false;
  /** Given by the backend, and by no harvest yet. */
  #ranges: number[] = [];

  constructor(backend: WorkerHost) {
    this.#backend = backend;
  }

  /** What is written before it resolves need not be told: all memory is to be copied after it. */
  async start(): Promise<void> {
    await this.#backend.request("dirtyStart" satisfies keyof DirtyCommands);
    this.#ranges = [];
  }

  /**
   * Frames that devices have written since the last harvest, or may be writing: first frame and number, in pairs, in no
   * order. Each is to be copied after this resolves. Slice by slice, so that PIN requests are served between them. What
   * a harvest had when it failed, the next one gives.
   */
  async harvest(): Promise<number[]> {
    if (this.#harvesting) throw new UserError("a harvest is under way", 1);
    this.#harvesting = true;
    try {
      for (let more = true; more; ) {
        const slice = await this.#backend.request<DirtySlice>("dirtyHarvest" satisfies keyof DirtyCommands);
        for (const n of slice.ranges) this.#ranges.push(n);
        more = slice.more;
      }
    } finally {
      this.#harvesting = false;
    }
    const ranges = this.#ranges;
    this.#ranges = [];
    return ranges;
  }

  async stop(): Promise<void> {
    await this.#backend.request("dirtyStop" satisfies keyof DirtyCommands);
  }
}
