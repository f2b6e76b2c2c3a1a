import assert from "node:assert/strict";
import test from "node:test";
import fc from "fast-check";
import { commands, hold } from "./property.ts";

/** A counter that is wrong from 5 on, or from the third step on; and all cases that were tried. */
const counters = (tried: number[][], replay?: string) => {
  const step = (by: number): fc.Command<{ n: number }, number[]> => ({
    check: (m) => m.n + by < 9,
    run(m, steps) {
      steps.push(by);
      m.n += by;
      assert.ok(m.n < 5 && steps.length < 3, "wrong");
    },
    toString: () => `step ${by}`,
  });
  const played = commands([fc.nat(3).map(step)], 30, replay);
  return fc.property(played, (commands) => {
    const steps: number[] = [];
    tried.push(steps);
    fc.modelRun(() => ({ model: { n: 0 }, real: steps }), commands);
  });
};

test("a failure says how to play the shrunk case alone, and that does", () => {
  const tried: number[][] = [];
  let replay = "";
  assert.throws(
    () => hold("counters", counters(tried), 100),
    (error: Error) => {
      replay = /REPLAY='([^']*)'/.exec(error.message)?.[1] ?? "";
      return /seed: -?\d+, path: "/.test(error.message) && /wrong/.test(String(error.cause));
    },
  );
  const again: number[][] = [];
  assert.throws(() => hold("counters", counters(again, replay), 100, replay), /REPLAY/);
  const failing = (steps: number[]) => steps.length === 3 || steps.reduce((a, b) => a + b, 0) >= 5;
  assert.deepEqual(again, [tried.findLast(failing)]);
});
