import assert from "node:assert/strict";
import test from "node:test";
import { random } from "../../test/support/random.ts";
import type { Bdf } from "../base/units.ts";
import { milliseconds } from "../base/units.ts";
import { createPolicy, policies } from "../policy/registry.ts";
import { createSpeculation } from "../policy/speculation/registry.ts";
import { formatEvent, LOG_FORMAT, type LoggedEvent } from "../wire/event-log.ts";
import { Optimal } from "./optimal.ts";
import { type Replayed, replay } from "./replay.ts";
import { parseLines, type Trace } from "./trace.ts";

const HEADER = JSON.stringify({ format: LOG_FORMAT, memoryMiB: 8, machine: "embedded", workload: "a test" });
const SOURCE = { cpu: 0, endpoint: 0x20 as Bdf };

type Step = readonly [ms: number, kind: "map" | "unmap", ...frames: number[]];
const event = ([ms, kind, ...frames]: Step): LoggedEvent => ({
  ...{ time: milliseconds(ms), kind, source: SOURCE },
  ranges: frames.map((gfn) => [gfn, 1] as const),
});
const traceOf = (...steps: Step[]): Promise<Trace> =>
  parseLines("test.log", [HEADER, ...steps.map((step) => formatEvent(event(step)).trimEnd())]);

const under = (trace: Trace, choice = "lru", intervalMs = 100, quota = Number.POSITIVE_INFINITY): Replayed =>
  replay(trace, {
    ...{ policy: createPolicy(choice), speculation: createSpeculation("off") },
    ...{ interval: milliseconds(intervalMs), quota, pressure: 1 },
  });

// --- traces --------------------------------------------------------------------------------------------------------

test("events are taken in the order of time, from the first one on; what is wrong is counted", async () => {
  const trace = await parseLines("test.log", [
    HEADER,
    formatEvent(event([30, "unmap", 5, 6, 9])).trimEnd(),
    formatEvent(event([20, "map", 5, 6])).trimEnd(),
    "nonsense",
    "7 - - map 5",
    "7 - - pinned 5+2",
    "9 - - unpinned 5",
    "# lost 17",
    "",
  ]);
  assert.deepEqual(
    trace.events.map(({ time, kind, ranges }) => [time, kind, ranges]),
    [
      [
        0,
        "map",
        [
          [5, 1],
          [6, 1],
        ],
      ],
      [
        1e7,
        "unmap",
        [
          [5, 1],
          [6, 1],
        ],
      ],
    ],
  );
  assert.deepEqual([trace.malformed, trace.firstMalformed, trace.lost], [3, 4, 17]);
  assert.deepEqual([trace.unmatchedUnmaps, trace.recorded], [1, { pinned: 2, unpinned: 1 }]);
});

for (const [what, lines] of [
  ["an empty file", []],
  ["another file", ["hello"]],
  ["a log of another version", [HEADER.replace("log/1", "log/2")]],
  ["a header without its memory", [JSON.stringify({ format: LOG_FORMAT, machine: "x", workload: "y" })]],
] as const)
  test(`${what} is wrong usage`, () =>
    assert.rejects(parseLines("test.log", lines), { code: "ERR_COIOMMU_USER", message: /^test\.log: / }));

// --- replay --------------------------------------------------------------------------------------------------------

test("a frame that is idle is unpinned by the second pass, and asked for again", async () => {
  const trace = await traceOf(
    [0, "map", 7],
    [10, "unmap", 7],
    [280, "map", 7],
    [290, "unmap", 7],
    [500, "map", 9],
  );
  const { pins, asks, maps, unmaps, frameSeconds, seconds } = under(trace);
  assert.deepEqual([maps, unmaps, asks, pins.pinRequests, pins.framesPinned], [3, 2, 3, 3, 3]);
  // 7 is pinned from 0 to 200 ms, and from 280 to 400 ms: each time the first pass clears A.
  assert.deepEqual([frameSeconds.toFixed(6), seconds], ["0.320000", 0.5]);
  assert.deepEqual([pins.framesPeak, pins.framesUnpinned, pins.framesCameBack], [1, 2, 1]);
});

test("a list is one operation, and one request while its ranges fit", async () => {
  const list = Array.from({ length: 600 }, (_, i) => 2 * i);
  const { asks, pins, maps } = under(await traceOf([0, "map", ...list], [1, "unmap", ...list]));
  assert.deepEqual([maps, asks, pins.pinRequests, pins.framesPinned], [1, 1, 3, 600]);
});

test("at the quota mappings are refused, and their unmaps left out", async () => {
  const trace = await traceOf(
    [0, "map", 1, 2, 3],
    [1, "map", 4, 5],
    [2, "unmap", 4, 5],
    [3, "unmap", 1, 2, 3],
    [4, "map", 6],
  );
  const { pins } = under(trace, "off", 100, 4);
  assert.deepEqual([pins.pinRequestsRefused, pins.framesPeak, pins.framesNow], [1, 4, 4]);
});

test("a speculation pins the neighbours of what is asked for, and is judged", async () => {
  const steps = Array.from({ length: 300 }, (_, i): Step => [i, "map", 512 + i]);
  const trace = await traceOf(...steps);
  const settings = { interval: milliseconds(100), quota: Number.POSITIVE_INFINITY, pressure: 0 };
  const play = (choice: string) =>
    replay(trace, { ...settings, policy: createPolicy("lru"), speculation: createSpeculation(choice) });
  assert.equal(play("off").asks, 300);
  const { asks, pins } = play("neighbours,budget=32");
  assert.ok(asks <= 12, `${asks} ask`);
  assert.ok(pins.framesSpeculative >= 280 && pins.speculationSaved >= 200, `${pins.speculationSaved} saved`);
  assert.equal(pins.speculationStopped, 0);
});

test("the first second counts for the whole, and not for the steady state", async () => {
  const trace = await traceOf([0, "map", 1], [999, "map", 2], [1001, "map", 2], [1500, "map", 3]);
  assert.deepEqual(under(trace, "off").steady, { maps: 2, pinRequests: 1 });
});

// --- the bound -----------------------------------------------------------------------------------------------------

/** Some seconds of some operations on some frames, so that policies have something to get wrong. */
async function randomTrace(seed: number, operations: number, frames: number): Promise<Trace> {
  const next = random(seed);
  const steps: Step[] = [];
  const live: number[][] = [];
  for (let ms = 0; steps.length < operations; ms += next(next(4) === 0 ? 400 : 40)) {
    if (live.length > 0 && next(2)) steps.push([ms, "unmap", ...live.splice(next(live.length), 1)[0]!]);
    else {
      const list = Array.from({ length: 1 + next(3) }, () => next(frames));
      live.push(list);
      steps.push([ms, "map", ...list]);
    }
  }
  return await traceOf(...steps);
}

/** Of every choice of which operations ask: the least frame-seconds for each number of them. */
function bruteForce({ events }: Trace): Map<number, number> {
  const least = new Map<number, number>();
  const maps = events.flatMap(({ kind }, i) => (kind === "map" ? [i] : []));
  for (let choice = 0; choice < 2 ** maps.length; choice++) {
    const asking = new Set(maps.filter((_, i) => choice & (1 << i)));
    const cost = costOf(events, asking);
    if (cost !== undefined) least.set(asking.size, Math.min(cost, least.get(asking.size) ?? cost));
  }
  return least;
}

/** Frame-seconds when a frame is let go of exactly in the gaps that end in `asking`; undefined if another has to ask. */
function costOf(events: Trace["events"], asking: ReadonlySet<number>): number | undefined {
  const frames = new Map<number, { count: number; since: number }>();
  let cost = 0;
  for (const [i, { kind, ranges, time }] of events.entries())
    for (const [gfn] of ranges) {
      const frame = frames.get(gfn) ?? { count: 0, since: Number.NaN };
      if (kind === "map" && frame.count++ === 0) {
        if (!frames.has(gfn) && !asking.has(i)) return undefined;
        if (frames.has(gfn) && !asking.has(i)) cost += time - frame.since;
        frame.since = time;
      } else if (kind === "unmap" && --frame.count === 0) {
        cost += time - frame.since;
        frame.since = time;
      }
      frames.set(gfn, frame);
    }
  const end = events.at(-1)!.time;
  for (const { count, since } of frames.values()) if (count > 0) cost += end - since;
  return cost / 1e9;
}

test("the bound is what trying every choice finds", async () => {
  for (let seed = 1; seed <= 60; seed++) {
    const trace = await randomTrace(seed, 14, 5);
    const optimal = new Optimal(trace);
    const least = bruteForce(trace);
    assert.equal(optimal.asksMin, Math.min(...least.keys()), `seed ${seed}`);
    assert.equal(optimal.frameSeconds(optimal.asksMin - 1), undefined);
    for (const [asks, seconds] of least) {
      const bound = optimal.frameSeconds(asks)!;
      assert.ok(Math.abs(bound - seconds) < 1e-9, `seed ${seed}, ${asks} ask: ${bound}, not ${seconds}`);
    }
  }
});

/** Throws when a policy needs less than `factor` times the bound. */
async function nobodyBeats(factor: number): Promise<void> {
  for (let seed = 1; seed <= 10; seed++) {
    const trace = await randomTrace(seed, 400, 40);
    const optimal = new Optimal(trace);
    for (const { name } of policies)
      for (const intervalMs of [10, 100, 1000]) {
        const { asks, frameSeconds } = under(trace, name, intervalMs);
        const bound = optimal.frameSeconds(asks);
        assert.ok(bound !== undefined, `${name} gets along with ${asks} that ask`);
        assert.ok(frameSeconds > factor * bound - 1e-6, `${name}: ${frameSeconds} is below ${bound}`);
      }
  }
}

test("no policy beats the bound", () => nobodyBeats(1));
test("broken twin: a bound that is too high is beaten", () => assert.rejects(nobodyBeats(1.3), /is below/));

test("the curve falls from what has to be asked for to what is mapped", async () => {
  const optimal = new Optimal(await randomTrace(3, 400, 40));
  const curve = optimal.curve(9);
  assert.equal(curve.length, 9);
  assert.deepEqual([curve[0]![0], curve[8]![0]], [optimal.asksMin, optimal.asksMax]);
  for (let i = 1; i < 9; i++) assert.ok(curve[i]![1] < curve[i - 1]![1]);
});
