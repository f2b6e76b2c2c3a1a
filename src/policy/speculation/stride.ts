import type { Gfn } from "../../base/units.ts";
import { count } from "../parameters.ts";
import { CANDIDATES_MAX, defineSpeculation, LIMITS } from "./speculation.ts";

/** Endpoints that are remembered. */
const ENDPOINTS_MAX = 64;

interface Course {
  /** First frame of the last request. */
  at: number;
  stride: number;
  /** How often it has been the same. */
  repeats: number;
}

/**
 * What an endpoint asks for next, when its requests follow each other at a constant distance. The next request is then
 * further away, because the guest does not ask for what was pinned unasked.
 */
export const stride = defineSpeculation({
  name: "stride",
  summary: "goes on at the distance at which the requests of an endpoint follow each other",
  source: "reference prediction tables: Baer and Chen, An Effective On-Chip Preloading Scheme, 1991",
  parameters: {
    ...LIMITS,
    repeats: count("how often the distance must have been the same", [2, 1, 1000]),
  },
  create(values) {
    const courses = new Map<number, Course>();
    return {
      pinned() {},
      tried() {},
      candidates({ ranges, endpoint }, _now, out) {
        const at = ranges[0]!.gfn;
        const course = courses.get(endpoint) ?? { at, stride: 0, repeats: 0 };
        if (!courses.has(endpoint) && courses.size === ENDPOINTS_MAX) courses.clear();
        courses.set(endpoint, course);
        if (at === course.at) return;
        const steps = (at - course.at) / course.stride;
        if (Number.isInteger(steps) && steps >= 1 && steps <= CANDIDATES_MAX) course.repeats++;
        else Object.assign(course, { stride: at - course.at, repeats: 0 });
        course.at = at;
        if (course.repeats < values.repeats) return;
        let left = CANDIDATES_MAX;
        for (let ahead = course.stride; left > 0; ahead += course.stride)
          for (const { gfn, nrFrames } of ranges)
            for (let next = gfn + ahead; next < gfn + ahead + nrFrames; next++) {
              if (left-- === 0 || out.full) return;
              if (next >= 0) out.push(next as Gfn);
            }
      },
    };
  },
});
