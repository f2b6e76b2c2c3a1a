import type { Nanoseconds } from "../base/units.ts";
import { FrameQueues } from "./frame-queues.ts";
import { count } from "./parameters.ts";
import { definePolicy } from "./policy.ts";

/** A hand goes around all pinned frames, a part of the circle in each pass. The circle is a queue that it turns. */
export const clock = definePolicy({
  name: "clock",
  summary: "as lru, but each pass tries a part of the frames: cheaper passes, frames that stay longer",
  source: "the clock of Corbató, A Paging Experiment with the Multics System, 1968",
  parameters: { passes: count("passes until all frames have been tried", [4, 1, 1000]) },
  create(values) {
    const frames = new FrameQueues();
    let pass: Nanoseconds | undefined;
    let left = 0;
    return {
      pinned: (gfn, now) => frames.add(gfn, now),
      tried: (gfn, outcome, now) => frames.tried(gfn, outcome, now),
      candidates(now, { framesMax }, out) {
        if (now !== pass) left = Math.ceil(frames.size() / values.passes);
        pass = now;
        left -= frames.give(out, Math.min(framesMax, left), now);
      },
    };
  },
});
