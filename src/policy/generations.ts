import type { Nanoseconds } from "../base/units.ts";
import { FrameQueues } from "./frame-queues.ts";
import { count } from "./parameters.ts";
import { definePolicy, isGone } from "./policy.ts";

const YOUNG = 0;
const OLD = 1;

/**
 * A frame that `threshold` passes in a row found busy is old: tried by every `threshold`th pass only. One that is found
 * idle once is young again. With crosvm's threshold of 0 a frame that was found busy is in no queue any more, and never
 * unpinned; here there is one generation then, that of the young.
 */
export const generations = definePolicy({
  name: "generations",
  summary: "as lru, but frames that many passes found busy are tried by every threshold-th pass only",
  source: "crosvm, devices/src/pci/coiommu.rs: unpin_gen_threshold",
  parameters: {
    threshold: count("passes that find a frame busy before it is old; 0: none gets old", [8, 0, 1000]),
  },
  create(values) {
    const frames = new FrameQueues(2);
    let pass: Nanoseconds | undefined;
    let passes = 0;
    return {
      state: () => ({ young: frames.size(YOUNG), old: frames.size(OLD) }),
      pinned: (gfn, now) => frames.add(gfn, now, YOUNG),
      tried(gfn, outcome, now) {
        if (!frames.has(gfn)) return;
        if (isGone(outcome)) return frames.remove(gfn);
        const busy = outcome === "refused" ? frames.count(gfn) : frames.count(gfn) + 1;
        frames.setCount(gfn, busy);
        frames.move(gfn, now, values.threshold > 0 && busy >= values.threshold ? OLD : YOUNG);
      },
      candidates(now, { framesMax }, out) {
        if (now !== pass) passes++;
        pass = now;
        const given =
          passes % Math.max(1, values.threshold) === 0 ? frames.give(out, framesMax, now, OLD) : 0;
        frames.give(out, framesMax - given, now, YOUNG);
      },
    };
  },
});
