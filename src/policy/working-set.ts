import { milliseconds, type Nanoseconds } from "../base/units.ts";
import { FrameQueues } from "./frame-queues.ts";
import { count, share, time } from "./parameters.ts";
import { definePolicy } from "./policy.ts";

const PINNED = 0;
/** Frames that were unpinned lately: `since` is when they were last known to be idle from. */
const GHOSTS = 1;

/**
 * Keeps what was mapped in the last T: a frame is tried when T has passed since its last try, which had cleared A. T
 * follows the intervals at which frames are mapped again: an unpinned frame that is asked for after less than four T
 * lengthens T towards its interval, and every pass shortens it a little.
 */
export const workingSet = definePolicy({
  name: "working-set",
  summary: "unpins what was not mapped for T; T follows the intervals at which frames are mapped again",
  source: "Denning, The Working Set Model for Program Behavior, 1968; WSClock: Carr and Hennessy, 1981",
  parameters: {
    min: time("least T", [500, 0, 3_600_000]),
    max: time("most T", [30_000, 0, 3_600_000]),
    decay: share("of T that a pass takes off", [0.02, 0, 1]),
    ghosts: count("unpinned frames that are remembered", [65_536, 0, 2 ** 24]),
  },
  create(values) {
    const frames = new FrameQueues(2);
    let pass: Nanoseconds | undefined;
    let window = milliseconds(values.min);
    const bounded = (ns: number) =>
      Math.max(milliseconds(values.min), Math.min(milliseconds(values.max), ns)) as Nanoseconds;
    return {
      state: () => ({ windowMs: Math.round(window / 1e6), ghosts: frames.size(GHOSTS) }),
      pinned(gfn, now) {
        if (frames.has(gfn) && frames.queue(gfn) === GHOSTS) {
          const interval = now - frames.since(gfn);
          if (interval < 4 * window && interval > window) window = bounded((window + 1.25 * interval) / 2);
          frames.remove(gfn);
        }
        frames.add(gfn, now, PINNED);
      },
      tried(gfn, outcome, now) {
        if (!frames.has(gfn) || frames.queue(gfn) === GHOSTS) return;
        if (outcome !== "claimed") return frames.tried(gfn, outcome, now);
        const idleSince = frames.since(gfn);
        frames.move(gfn, idleSince, GHOSTS);
        if (frames.size(GHOSTS) > values.ghosts) frames.remove(frames.oldest(GHOSTS)!);
      },
      candidates(now, { framesMax }, out) {
        if (now !== pass) window = bounded(window * (1 - values.decay));
        pass = now;
        frames.give(out, framesMax, now - window, PINNED);
      },
    };
  },
});
