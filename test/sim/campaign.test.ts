import assert from "node:assert/strict";
import test from "node:test";
import { shorten, simulate } from "../../src/sim/simulate.ts";

const SEEDS = 1000;
const STEPS = 10_000;

test(`${SEEDS} machines of ${STEPS} steps are clean, and none was spared`, (t) => {
  const sums: Record<string, number> = {};
  for (let seed = 1; seed <= SEEDS; seed++) {
    const { error, statistics } = simulate(seed, STEPS);
    for (const [name, n] of Object.entries(statistics)) sums[name] = (sums[name] ?? 0) + n;
    if (!error) continue;
    const { steps, message } = shorten(seed, STEPS, error);
    assert.fail(`${message}; play it again with: npx coiommu sim --seed ${seed} --steps ${steps}`);
  }
  t.diagnostic(JSON.stringify(sums));
  assert.ok(sums.steps! >= SEEDS * STEPS);
  for (const [name, n] of Object.entries(sums)) assert.ok(n > 100, `only ${n} ${name}`);
});
