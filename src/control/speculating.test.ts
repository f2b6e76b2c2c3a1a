import assert from "node:assert/strict";
import test from "node:test";
import { active } from "../../test/support/machine.ts";
import { Speculating } from "./speculating.ts";

test("parameters change live, and what is known stays; another name begins anew", () => {
  const speculating = new Speculating("stride,repeats=1,budget=1", (text) => assert.fail(text));
  const m = active(speculating.ofTracker);
  for (const gfn of [100, 104, 108]) m.map(gfn);
  assert.deepEqual(m.held(112, 116), [true, false]);
  speculating.set(m.tracker, "stride,repeats=1,budget=2");
  m.map(116);
  assert.deepEqual(m.held(120, 124, 128), [true, true, false], "the course is known still");
  speculating.set(m.tracker, "neighbours,budget=1");
  m.map(200);
  assert.deepEqual([m.held(201), m.tracker.speculation.name], [[true], "neighbours"]);
  speculating.set(m.tracker, "stride,repeats=1,budget=2");
  m.map(132);
  assert.deepEqual(m.held(136), [false], "it knows of no course");
});

test("a choice that is wrong changes nothing", () => {
  const speculating = new Speculating("neighbours,budget=1", (text) => assert.fail(text));
  const m = active(speculating.ofTracker);
  assert.throws(() => speculating.set(m.tracker, "neighbours,budget=0"), { code: "ERR_COIOMMU_USER" });
  assert.throws(() => speculating.set(m.tracker, "luck"), { code: "ERR_COIOMMU_USER" });
  m.map(5);
  assert.deepEqual(m.held(6, 7), [true, false]);
});

test("one that has switched itself off is told of in a sentence", () => {
  const told: string[] = [];
  const m = active(new Speculating("neighbours,budget=4,judged=4", (text) => told.push(text)).ofTracker);
  m.map(5);
  m.map(6);
  m.pass();
  assert.deepEqual(told, [
    "--speculate neighbours,budget=4,judged=4 has switched itself off: of the last 4 frames that it pinned, the guest used 1",
  ]);
});
