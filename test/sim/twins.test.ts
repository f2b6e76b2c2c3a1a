import assert from "node:assert/strict";
import test from "node:test";
import { simulate } from "../../src/sim/simulate.ts";
import { twins } from "./twins.ts";

const STEPS = 5_000;
const STEPS_MAX = 300_000;

for (const [what, { twin, found, settings, stepsMax = STEPS_MAX }] of Object.entries(twins))
  test(`broken twin is found within ${stepsMax} steps: ${what}`, (t) => {
    let steps = 0;
    for (let seed = 1; steps < stepsMax; seed++) {
      const { error, statistics } = simulate(
        seed,
        STEPS,
        typeof twin === "function" ? twin() : twin,
        settings,
      );
      steps += statistics.steps;
      if (!error) continue;
      t.diagnostic(`seed ${seed}, after ${steps} steps in all: ${error.message}`);
      assert.match(error.message, found);
      assert.ok(steps <= stepsMax);
      return;
    }
    assert.fail("not found");
  });
