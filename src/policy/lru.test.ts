import assert from "node:assert/strict";
import test from "node:test";
import { random } from "../../test/support/random.ts";
import type { Gfn, Nanoseconds } from "../base/units.ts";
import { LruPolicy } from "./lru.ts";
import { type Claim, GfnBuffer } from "./policy.ts";
import { createPolicy, policies } from "./registry.ts";

const at = (time: number) => time as Nanoseconds;
const frame = (gfn: number) => gfn as Gfn;

function candidates(policy: LruPolicy, now: number, framesMax = 1000): number[] {
  const out = new GfnBuffer(1000);
  policy.candidates(at(now), { framesMax }, out);
  return Array.from({ length: out.length }, (_, i) => out.at(i));
}

test("candidates come in the order in which they were pinned or last tried", () => {
  const policy = new LruPolicy();
  for (const gfn of [5, 3, 2 ** 33, 9]) policy.pinned(frame(gfn), at(1));
  assert.deepEqual(candidates(policy, 2), [5, 3, 2 ** 33, 9]);
  policy.tried(frame(3), "accessed", at(2));
  policy.tried(frame(5), "mapped", at(2));
  assert.deepEqual(candidates(policy, 3), [2 ** 33, 9, 3, 5]);
});

test("a pass tries no frame twice, and none that was pinned after it began", () => {
  const policy = new LruPolicy();
  policy.pinned(frame(1), at(1));
  policy.pinned(frame(2), at(5));
  assert.deepEqual(candidates(policy, 5), [1]);
  policy.tried(frame(1), "refused", at(5));
  assert.deepEqual(candidates(policy, 5), []);
  assert.deepEqual(candidates(policy, 6), [2, 1]);
});

test("at most framesMax candidates are given", () => {
  const policy = new LruPolicy();
  for (let gfn = 0; gfn < 100; gfn++) policy.pinned(frame(gfn), at(1));
  assert.deepEqual(candidates(policy, 2, 3), [0, 1, 2]);
});

for (const [outcome, kept] of [
  ["claimed", false],
  ["gone", false],
  ["mapped", true],
  ["accessed", true],
  ["refused", true],
] as const)
  test(`a frame whose try was "${outcome}" is ${kept ? "tried again by the next pass" : "forgotten"}`, () => {
    const policy = new LruPolicy();
    policy.pinned(frame(1), at(1));
    policy.tried(frame(1), outcome, at(2));
    assert.deepEqual(candidates(policy, 3), kept ? [1] : []);
  });

test("a second pin of a frame does not list it twice; a try of an unknown frame is ignored", () => {
  const policy = new LruPolicy();
  policy.pinned(frame(1), at(1));
  policy.pinned(frame(1), at(2));
  policy.tried(frame(2), "claimed", at(2));
  assert.deepEqual(candidates(policy, 3), [1]);
});

test("against a list as model: 20,000 random events keep the order", () => {
  const next = random(7);
  const policy = new LruPolicy();
  let model: number[] = [];
  const outcomes: Claim[] = ["claimed", "mapped", "accessed", "gone", "refused"];
  for (let now = 1; now <= 20_000; now++) {
    const gfn = next(200);
    const outcome = outcomes[next(outcomes.length)]!;
    if (next(2)) {
      policy.pinned(frame(gfn), at(now));
      if (!model.includes(gfn)) model.push(gfn);
    } else {
      policy.tried(frame(gfn), outcome, at(now));
      const known = model.includes(gfn);
      model = model.filter((g) => g !== gfn);
      if (known && outcome !== "claimed" && outcome !== "gone") model.push(gfn);
    }
    if (now % 100 === 0) assert.deepEqual(candidates(policy, now + 1), model, `after ${now} events`);
  }
});

test("every policy of the registry is made by its name, and has it", () => {
  for (const { name } of policies) assert.equal(createPolicy(name).name, name);
});

for (const text of ["", "LRU", "lru,age=1", "mru"])
  test(`--policy "${text}" is refused with wrong usage`, () =>
    assert.throws(() => createPolicy(text), { code: "ERR_COIOMMU_USER", exitCode: 2 }));

test("policy off gives no candidates", () => {
  const policy = createPolicy("off");
  policy.pinned(frame(1), at(1));
  const out = new GfnBuffer(10);
  policy.candidates(at(2), { framesMax: 10 }, out);
  assert.equal(out.length, 0);
});
