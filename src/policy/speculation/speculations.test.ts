import assert from "node:assert/strict";
import test from "node:test";
import { random } from "../../../test/support/random.ts";
import { type Gfn, milliseconds } from "../../base/units.ts";
import { type Claim, GfnBuffer } from "../policy.ts";
import { createSpeculation, speculations } from "./registry.ts";
import { type Asked, CANDIDATES_MAX, type Speculation } from "./speculation.ts";

/** What is likely next after a request for frames, or ranges of them. */
function next(
  speculation: Speculation,
  ...asked: readonly (number | readonly [gfn: number, nrFrames: number])[]
): number[] {
  return after(speculation, 0x20, ...asked);
}

function after(
  speculation: Speculation,
  endpoint: number,
  ...asked: readonly (number | readonly [gfn: number, nrFrames: number])[]
): number[] {
  const out = new GfnBuffer(CANDIDATES_MAX);
  const ranges = asked.map((range) => (typeof range === "number" ? ([range, 1] as const) : range));
  const request: Asked = { ranges: ranges.map(([gfn, nrFrames]) => ({ gfn, nrFrames })), endpoint };
  speculation.candidates(request, milliseconds(0), out);
  return Array.from({ length: out.length }, (_, i) => out.at(i));
}

const pin = (speculation: Speculation, ms: number, ...gfns: number[]): void => {
  for (const gfn of gfns) speculation.pinned(gfn as Gfn, milliseconds(ms));
};
const unpin = (speculation: Speculation, ms: number, ...gfns: number[]): void => {
  for (const gfn of gfns) speculation.tried(gfn as Gfn, "claimed", milliseconds(ms));
};

/** Frames that have come back once, and have left again at `ms`, in this order. */
function ghosts(speculation: Speculation, ms: number, ...gfns: number[]): void {
  unpin(speculation, 0, ...gfns);
  pin(speculation, 0, ...gfns);
  unpin(speculation, ms, ...gfns);
}

// --- every speculation ---------------------------------------------------------------------------------------------

for (const { name } of speculations)
  test(`${name}: whatever happens, it names no more than there is room for, and throws nothing`, () => {
    const random32 = random(0x5eed);
    const speculation = createSpeculation(name);
    const outcomes: Claim[] = ["claimed", "mapped", "accessed", "gone", "refused"];
    for (let i = 0; i < 5000; i++) {
      const gfn = (random32(300) * 2 ** random32(42)) as Gfn;
      if (random32(3) === 0) speculation.pinned(gfn, milliseconds(i));
      else if (random32(2) === 0) speculation.tried(gfn, outcomes[random32(5)]!, milliseconds(i));
      else {
        const ranges = Array.from({ length: 1 + random32(3) }, () => ({
          gfn: random32(300) * 2 ** random32(42),
          nrFrames: 1 + random32(2) * random32(1e6),
        }));
        const out = new GfnBuffer(random32(40));
        speculation.candidates({ ranges, endpoint: random32(1000) }, milliseconds(i), out);
        for (let j = 0; j < out.length; j++) assert.ok(out.at(j) >= 0, `frame ${out.at(j)}`);
      }
    }
  });

test("names, and parameters that all have", () => {
  assert.deepEqual(
    speculations.map(({ name }) => name),
    ["off", "ghost", "neighbours", "stride"],
  );
  assert.deepEqual(createSpeculation("neighbours,budget=8").parameters, { budget: 8, judged: 256 });
  assert.deepEqual(createSpeculation("off").parameters, {});
  for (const [choice, message] of [
    ["luck", /--speculate luck: no speculation is named "luck"; there are off, ghost, neighbours, stride/],
    ["ghost,budget=0", /--speculate ghost,budget=0: budget takes a whole number from 1 to 512/],
    ["off,budget=1", /has no parameter "budget"; it has none/],
  ] as const)
    assert.throws(() => createSpeculation(choice), { code: "ERR_COIOMMU_USER", exitCode: 2, message });
});

// --- neighbours ----------------------------------------------------------------------------------------------------

test("neighbours: those that follow in the block of 2 MiB, then those before, nearest first", () => {
  const speculation = createSpeculation("neighbours");
  assert.deepEqual(next(speculation, 508), [
    509,
    510,
    511,
    ...Array.from({ length: 508 }, (_, i) => 507 - i),
  ]);
  assert.deepEqual(next(speculation, [512, 510]), [1022, 1023]);
});

test("neighbours: around each range, what is near comes first", () => {
  assert.deepEqual(next(createSpeculation("neighbours"), 10, [700, 4]).slice(0, 4), [11, 704, 12, 705]);
});

// --- stride --------------------------------------------------------------------------------------------------------

test("stride: goes on at the distance that was the same three times, in whole requests", () => {
  const speculation = createSpeculation("stride,repeats=2");
  assert.deepEqual(
    [next(speculation, [100, 2]), next(speculation, [110, 2]), next(speculation, [120, 2])],
    [[], [], []],
  );
  assert.deepEqual(next(speculation, [130, 2]).slice(0, 5), [140, 141, 150, 151, 160]);
});

test("stride: what the guest did not ask for, because it was pinned unasked, is a part of the way", () => {
  const speculation = createSpeculation("stride,repeats=1");
  for (const gfn of [0, 4, 8]) next(speculation, gfn);
  assert.deepEqual(next(speculation, 8 + 4 * 33).slice(0, 2), [8 + 4 * 34, 8 + 4 * 35]);
  assert.deepEqual(next(speculation, 8 + 4 * 33 + 2), [], "not on the way");
});

test("stride: downwards it ends at frame 0", () => {
  const speculation = createSpeculation("stride,repeats=1");
  for (const gfn of [50, 40]) next(speculation, gfn);
  assert.deepEqual(next(speculation, 30), [20, 10, 0]);
});

test("stride: each endpoint has a course of its own", () => {
  const speculation = createSpeculation("stride,repeats=1");
  for (const gfn of [0, 7]) {
    after(speculation, 1, gfn);
    after(speculation, 2, 1000 - gfn);
  }
  assert.deepEqual(
    [after(speculation, 1, 14)[0], after(speculation, 2, 986)[0]],
    [21, 979],
    "endpoints 1 and 2 in turn",
  );
});

// --- ghost ---------------------------------------------------------------------------------------------------------

test("ghost: those that left after the frame, then those that left before it", () => {
  const speculation = createSpeculation("ghost");
  ghosts(speculation, 10, 5, 90, 7, 300, 2);
  assert.deepEqual(next(speculation, 7), [300, 2, 90, 5]);
});

test("ghost: only what has come back before", () => {
  const speculation = createSpeculation("ghost");
  unpin(speculation, 10, 5, 6, 7);
  assert.deepEqual(next(speculation, 5), []);
  pin(speculation, 20, 6);
  unpin(speculation, 30, 6);
  assert.deepEqual(next(speculation, 7), [6]);
});

test("ghost: only what left about the same time, and is not pinned", () => {
  const speculation = createSpeculation("ghost,together=5ms");
  ghosts(speculation, 10, 5, 6);
  ghosts(speculation, 14, 7);
  ghosts(speculation, 16, 8);
  pin(speculation, 18, 6);
  assert.deepEqual(next(speculation, 5), [7]);
});

test("ghost: what was pinned unasked in vain has to come back by itself before it is named again", () => {
  const speculation = createSpeculation("ghost");
  ghosts(speculation, 10, 5, 6);
  unpin(speculation, 11, 6); // was pinned, and the guest has not used it
  assert.deepEqual(next(speculation, 5), []);
  pin(speculation, 12, 6);
  unpin(speculation, 12, 6);
  assert.deepEqual(next(speculation, 5), [6]);
});

test("ghost: it forgets the oldest, and what is no longer RAM", () => {
  const speculation = createSpeculation("ghost,ghosts=3");
  ghosts(speculation, 10, 5, 6, 7);
  ghosts(speculation, 11, 8);
  assert.deepEqual(next(speculation, 7), [8, 6], "not 5");
  speculation.tried(6 as Gfn, "gone", milliseconds(12));
  assert.deepEqual(next(speculation, 7), [8]);
});
