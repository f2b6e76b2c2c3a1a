import { type Gfn, milliseconds } from "../../base/units.ts";
import { FrameQueues } from "../frame-queues.ts";
import { count, time } from "../parameters.ts";
import type { GfnBuffer } from "../policy.ts";
import { CANDIDATES_MAX, defineSpeculation, LIMITS } from "./speculation.ts";

/** Frames that came back, while they are pinned. */
const PINNED = 0;
/** Frames that were unpinned lately, in that order: `since` is when. Count 1: it came back at least once. */
const GHOSTS = 1;

/**
 * Frames that were unpinned together, and that the guest came back to before, come back together: when one of them is
 * asked for, those that left after it are next, then those that left before.
 */
export const ghost = defineSpeculation({
  name: "ghost",
  summary: "what was unpinned together with a frame that is asked for, and has come back before",
  source: "ghost lists: Megiddo and Modha, ARC, 2003; temporal prefetching: Joseph and Grunwald, 1997",
  parameters: {
    ...LIMITS,
    together: time("between two unpins that count as together, at most", [2000, 0, 3_600_000]),
    ghosts: count("unpinned frames that are remembered", [65_536, 1, 2 ** 24]),
  },
  create(values) {
    const frames = new FrameQueues(2);
    const follow = (from: Gfn, next: (gfn: Gfn) => Gfn | undefined, out: GfnBuffer): void => {
      if (!frames.has(from) || frames.queue(from) !== GHOSTS) return;
      const left = frames.since(from);
      let gfn = next(from);
      for (let steps = 0; gfn !== undefined && steps < CANDIDATES_MAX && !out.full; steps++) {
        if (Math.abs(frames.since(gfn) - left) > milliseconds(values.together)) return;
        if (frames.count(gfn) > 0) out.push(gfn);
        gfn = next(gfn);
      }
    };
    return {
      pinned(gfn, now) {
        if (!frames.has(gfn) || frames.queue(gfn) !== GHOSTS) return;
        frames.setCount(gfn, 1);
        frames.move(gfn, now, PINNED);
      },
      tried(gfn, outcome, now) {
        if (outcome === "gone") frames.remove(gfn);
        if (outcome !== "claimed") return;
        // Pinned unasked, and in vain.
        if (frames.has(gfn) && frames.queue(gfn) === GHOSTS) frames.setCount(gfn, 0);
        if (frames.has(gfn)) frames.move(gfn, now, GHOSTS);
        else frames.add(gfn, now, GHOSTS);
        if (frames.size(GHOSTS) > values.ghosts) frames.remove(frames.oldest(GHOSTS)!);
      },
      candidates({ ranges }, _now, out) {
        const { gfn, nrFrames } = ranges.at(-1)!;
        follow((gfn + nrFrames - 1) as Gfn, (g) => frames.after(g), out);
        follow(ranges[0]!.gfn as Gfn, (g) => frames.before(g), out);
      },
    };
  },
});
