import type { Nanoseconds } from "../base/units.ts";
import { FrameQueues } from "./frame-queues.ts";
import { share, text } from "./parameters.ts";
import { definePolicy } from "./policy.ts";

/**
 * Idle while the host has memory: a pinned page costs nothing that nobody wants. Between `low` and `high` a pass tries a
 * part of the frames that grows with the pressure, the longest untried first; from `high` on all of them.
 */
export const pressure = definePolicy({
  name: "pressure",
  summary: "idle while the host has memory; unpins the harder the longer tasks wait for it",
  source: "Linux, Documentation/accounting/psi.rst: some avg10; systemd-oomd and oomd act on the same figure",
  parameters: {
    low: share("of time that tasks wait for memory, below which nothing is unpinned", [0.01, 0, 1]),
    high: share("from which on each pass tries all", [0.1, 0, 1]),
    file: text("what says it: of the host, or a cgroup's memory.pressure", "/proc/pressure/memory"),
  },
  create(values) {
    const frames = new FrameQueues();
    let pass: Nanoseconds | undefined;
    let left = 0;
    let seen = 0;
    return {
      state: () => ({ pressure: seen }),
      pressureFile: () => values.file,
      pinned: (gfn, now) => frames.add(gfn, now),
      tried: (gfn, outcome, now) => frames.tried(gfn, outcome, now),
      candidates(now, limit, out) {
        seen = limit.pressure;
        if (now !== pass) left = Math.ceil(frames.size() * hardness(seen, values));
        pass = now;
        left -= frames.give(out, Math.min(limit.framesMax, left), now);
      },
    };
  },
});

/** The part of the frames that a pass tries: 0 to 1. */
const hardness = (seen: number, { low, high }: { readonly low: number; readonly high: number }): number => {
  if (seen < low || seen === 0) return 0;
  return seen >= high ? 1 : (seen - low) / (high - low);
};
