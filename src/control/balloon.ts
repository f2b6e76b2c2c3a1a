import { setTimeout as sleep } from "node:timers/promises";
import { UserError } from "../base/errors.ts";
import type { Qmp } from "../machine/qemu/qmp.ts";
import type { Operator } from "./operator.ts";

const MIB = 2 ** 20;
const LOOK_MS = 50;
/** Sweeps before the guest gets memory back: a device or the host may keep a frame for a moment. */
const SWEEPS_MAX = 20;
/** A guest that has not moved for so long will not: its memory is in use, or it has no driver. */
const PATIENCE_MS = 3000;

type BalloonQmp = Pick<Qmp, "execute" | "onEvent">;

/** What a balloon did; the fields of the answer to `PUT /v1/balloon`. */
export interface Resized {
  readonly memoryMiB: number;
  readonly unpinned: number;
  readonly stayed: number;
}

/**
 * QEMU's balloon, whose frames must not stay pinned: QEMU discards their memory, and what a pin holds from then on is a
 * page that the guest does not see. Once it has its frame back, a device behind a hardware IOMMU would write there.
 *
 * QEMU asks nobody before it discards. So the frames are found afterwards, because pinned memory vanishes in no other
 * way, and before the guest gets them back, because it gets none until it is told to; then it has to ask for a pin
 * again. A guest that takes frames back unasked, before a sweep that BALLOON_CHANGE began, keeps a pin that is stale.
 */
export class Balloon {
  readonly #qmp: BalloonQmp;
  readonly #operator: Pick<Operator, "unpinIdle">;
  #unpinned = 0;
  #last: Promise<unknown> = Promise.resolve();

  constructor(qmp: BalloonQmp, operator: Pick<Operator, "unpinIdle">) {
    this.#qmp = qmp;
    this.#operator = operator;
    // By whomever. QEMU tells at most once a second, and of the last change always.
    qmp.onEvent(({ event }) => {
      if (event === "BALLOON_CHANGE") this.#sweep().catch(() => {}); // where it cannot be done, resize() says why
    });
  }

  /**
   * Leave the guest `memoryMiB`, or as much less or more as it manages. Throws UserError without a balloon's driver, and
   * where frames stay pinned whatever becomes of them. Calls are served one after the other: what one has made the guest
   * give must be unpinned before another gives it back.
   */
  resize(memoryMiB: number, signal?: AbortSignal): Promise<Resized> {
    const done = this.#last.then(() => this.#resize(memoryMiB * MIB, signal));
    this.#last = done.catch(() => {});
    return done;
  }

  async #resize(target: number, signal?: AbortSignal): Promise<Resized> {
    const before = this.#unpinned;
    let actual = await this.#actual();
    let stayed = await this.#sweep();
    for (let sweeps = 1; target > actual && stayed > 0; sweeps++) {
      if (sweeps === SWEEPS_MAX)
        throw new UserError(`the guest cannot have its memory back: ${stayed} frames of it stay pinned`, 1);
      await sleep(LOOK_MS);
      stayed = await this.#sweep();
    }
    await this.#qmp.execute("balloon", { value: target });
    for (let still = 0; actual !== target && still < PATIENCE_MS && !signal?.aborted; still += LOOK_MS) {
      await sleep(LOOK_MS);
      const now = await this.#actual();
      if (now !== actual) still = 0;
      actual = now;
    }
    stayed = await this.#sweep();
    return { memoryMiB: actual / MIB, unpinned: this.#unpinned - before, stayed };
  }

  /** Unpin what has been discarded. Returns how many such frames stayed. */
  async #sweep(): Promise<number> {
    const range = { first: 0, end: Number.POSITIVE_INFINITY, discarded: true };
    const { unpinned, stayed } = await this.#operator.unpinIdle(range);
    this.#unpinned += unpinned;
    return stayed;
  }

  async #actual(): Promise<number> {
    return (await this.#qmp.execute<{ actual: number }>("query-balloon")).actual;
  }
}
