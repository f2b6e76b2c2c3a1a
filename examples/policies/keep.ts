import { milliseconds } from "../../src/base/units.ts";
import { FrameQueues } from "../../src/policy/frame-queues.ts";
import { time } from "../../src/policy/parameters.ts";
import { definePolicy } from "../../src/policy/policy.ts";

/** Keeps every frame for a while after it was last found in use, whatever the interval between passes. */
export default definePolicy({
  name: "keep",
  summary: "unpins what was not mapped for so long",
  source: "docs/guide/policy.md",
  parameters: { for: time("how long an idle frame stays pinned", [5000, 0, 3_600_000]) },
  create(values) {
    const frames = new FrameQueues();
    return {
      pinned: (gfn, now) => frames.add(gfn, now),
      tried: (gfn, outcome, now) => frames.tried(gfn, outcome, now),
      candidates(now, { framesMax }, out) {
        frames.give(out, framesMax, now - milliseconds(values.for));
      },
    };
  },
});
