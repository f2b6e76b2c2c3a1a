import type { Gfn } from "../../base/units.ts";
import type { GfnBuffer } from "../policy.ts";
import { defineSpeculation, LIMITS } from "./speculation.ts";

const BLOCK_FRAMES = 512;
/** Of one request, the last ones. */
const RANGES_MAX = 16;

const blockOf = (gfn: number): number => Math.floor(gfn / BLOCK_FRAMES);

/** Frames of the blocks of what was asked for: by distance, first those that follow, then those that come before. */
export const neighbours = defineSpeculation({
  name: "neighbours",
  summary: "the frames around those that are asked for, in the same 2 MiB; first those that follow",
  source: "read-ahead around a fault, as fault-around of Linux 3.15; allocators hand out neighbours together",
  parameters: LIMITS,
  create: () => ({
    pinned() {},
    tried() {},
    candidates({ ranges }, _now, out) {
      const last = ranges.slice(-RANGES_MAX);
      from(
        out,
        last.map(({ gfn, nrFrames }) => gfn + nrFrames - 1),
        1,
      );
      from(
        out,
        last.map(({ gfn }) => gfn),
        -1,
      );
    },
  }),
});

/** Append what lies beside these frames, on one side. */
function from(out: GfnBuffer, edges: readonly number[], side: 1 | -1): void {
  for (let distance = 1; distance < BLOCK_FRAMES; distance++)
    for (const edge of edges) {
      const gfn = edge + side * distance;
      if (blockOf(gfn) !== blockOf(edge)) continue;
      if (out.full) return;
      out.push(gfn as Gfn);
    }
}
