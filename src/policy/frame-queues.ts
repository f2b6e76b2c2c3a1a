import { FrameIndex, grown } from "../base/frame-index.ts";
import type { Gfn, Nanoseconds } from "../base/units.ts";
import { type Claim, type GfnBuffer, isGone } from "./policy.ts";

/** Links are ids + 1, so that a zeroed array is an empty list. */
const NONE = 0;

/** Frames in first-in-first-out queues, each in one of them, with when it came there. All O(1), about 50 bytes a frame. */
export class FrameQueues {
  readonly #frames = new FrameIndex();
  #next = new Int32Array(0);
  #previous = new Int32Array(0);
  #queue = new Uint8Array(0);
  #since = new Float64Array(0);
  #counts = new Int32Array(0);
  readonly #oldest: Int32Array;
  readonly #newest: Int32Array;
  readonly #sizes: Int32Array;

  constructor(queues = 1) {
    this.#oldest = new Int32Array(queues);
    this.#newest = new Int32Array(queues);
    this.#sizes = new Int32Array(queues);
  }

  /** Frames in `queue`. */
  size(queue = 0): number {
    return this.#sizes[queue]!;
  }

  has(gfn: Gfn): boolean {
    return this.#frames.find(gfn) >= 0;
  }
  /** The queue that a frame is in. */
  queue(gfn: Gfn): number {
    return this.#queue[this.#frames.find(gfn)]!;
  }
  /** When a frame was put where it is. */
  since(gfn: Gfn): Nanoseconds {
    return this.#since[this.#frames.find(gfn)]! as Nanoseconds;
  }
  /** A number of the policy's own, 0 for a frame that is new. */
  count(gfn: Gfn): number {
    return this.#counts[this.#frames.find(gfn)]!;
  }
  setCount(gfn: Gfn, count: number): void {
    this.#counts[this.#frames.find(gfn)] = count;
  }

  /** Put a frame to the end of `queue`; one that is in a queue already stays where it is. */
  add(gfn: Gfn, now: Nanoseconds, queue = 0): void {
    if (this.has(gfn)) return;
    const id = this.#frames.insert(gfn);
    const { capacity } = this.#frames;
    this.#next = grown(this.#next, capacity);
    this.#previous = grown(this.#previous, capacity);
    this.#queue = grown(this.#queue, capacity);
    this.#since = grown(this.#since, capacity);
    this.#counts = grown(this.#counts, capacity);
    this.#counts[id] = 0;
    this.#append(id, now, queue);
  }

  /** Put a frame that is in a queue to the end of `queue`. */
  move(gfn: Gfn, now: Nanoseconds, queue = 0): void {
    const id = this.#frames.find(gfn);
    this.#unlink(id);
    this.#append(id, now, queue);
  }

  /** What most policies do after a try: forget a frame that is gone, and put any other to the end of its queue. */
  tried(gfn: Gfn, outcome: Claim, now: Nanoseconds): void {
    const id = this.#frames.find(gfn);
    if (id < 0) return;
    this.#unlink(id);
    if (isGone(outcome)) this.#frames.remove(gfn);
    else this.#append(id, now, this.#queue[id]!);
  }

  remove(gfn: Gfn): void {
    const id = this.#frames.remove(gfn);
    if (id >= 0) this.#unlink(id);
  }

  /** The frame that is longest in `queue`. */
  oldest(queue = 0): Gfn | undefined {
    return this.#linked(this.#oldest[queue]!);
  }

  /** The frame that came into the queue of `gfn` next. */
  after(gfn: Gfn): Gfn | undefined {
    return this.#linked(this.#next[this.#frames.find(gfn)]!);
  }
  /** The one that had come before. */
  before(gfn: Gfn): Gfn | undefined {
    return this.#linked(this.#previous[this.#frames.find(gfn)]!);
  }

  /** Append to `out` up to `framesMax` frames that are in `queue` since before `before`, the longest first: so many. */
  give(out: GfnBuffer, framesMax: number, before: number, queue = 0): number {
    let link = this.#oldest[queue]!;
    let n = 0;
    for (; n < framesMax && link !== NONE && this.#since[link - 1]! < before; n++) {
      out.push(this.#frames.gfn(link - 1));
      link = this.#next[link - 1]!;
    }
    return n;
  }

  #linked(link: number): Gfn | undefined {
    return link === NONE ? undefined : this.#frames.gfn(link - 1);
  }

  #append(id: number, now: Nanoseconds, queue: number): void {
    this.#since[id] = now;
    this.#queue[id] = queue;
    this.#next[id] = NONE;
    this.#previous[id] = this.#newest[queue]!;
    if (this.#newest[queue] === NONE) this.#oldest[queue] = id + 1;
    else this.#next[this.#newest[queue]! - 1] = id + 1;
    this.#newest[queue] = id + 1;
    this.#sizes[queue]!++;
  }

  #unlink(id: number): void {
    const queue = this.#queue[id]!;
    const next = this.#next[id]!;
    const previous = this.#previous[id]!;
    if (previous === NONE) this.#oldest[queue] = next;
    else this.#next[previous - 1] = next;
    if (next === NONE) this.#newest[queue] = previous;
    else this.#previous[next - 1] = previous;
    this.#sizes[queue]!--;
  }
}
