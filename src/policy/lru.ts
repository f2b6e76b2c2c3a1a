import { FrameQueues } from "./frame-queues.ts";
import { definePolicy } from "./policy.ts";

/**
 * Every pass tries every frame that was pinned before it, the longest untried first. A frame that was mapped since the
 * last pass has A set, which the try clears: it is unpinned by the second pass that finds it idle.
 */
export const lru = definePolicy({
  name: "lru",
  summary: "each pass tries all pinned frames; unpinned by the second pass that finds it idle",
  source: "second chance: Corbató, A Paging Experiment with the Multics System, 1968; coIOMMU, ATC 2020",
  parameters: {},
  create() {
    const frames = new FrameQueues();
    return {
      pinned: (gfn, now) => frames.add(gfn, now),
      tried: (gfn, outcome, now) => frames.tried(gfn, outcome, now),
      candidates: (now, { framesMax }, out) => void frames.give(out, framesMax, now),
    };
  },
});
