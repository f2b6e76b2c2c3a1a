import assert from "node:assert/strict";
import test from "node:test";
import { settingsOf } from "./settings.ts";
import { shorten, simulate } from "./simulate.ts";

test("the same seed plays the same machine", () => {
  for (const seed of [1, 2, 3]) assert.deepEqual(simulate(seed, 3000), simulate(seed, 3000));
  assert.notDeepEqual(simulate(1, 3000).statistics, simulate(2, 3000).statistics);
});

test("seeds bring about every kind of machine", () => {
  const settings = Array.from({ length: 200 }, (_, seed) => settingsOf(seed));
  for (const name of Object.keys(settings[0]!) as (keyof (typeof settings)[0])[])
    assert.ok(new Set(settings.map((s) => s[name])).size > 1, name);
});

test("regression: a lone CPU and passes that try nothing come to an end, whatever else a seed chooses", () => {
  for (const seed of [1776, 5706, 7754, 8310]) {
    assert.equal(settingsOf(seed).cpus, 1);
    assert.equal(simulate(seed, 5000).error, undefined);
  }
});

test("a failure is cut down to the fewest steps after which it still fails", () => {
  // In its world a lost kick is waited for, and given up.
  const seed = 2;
  const twin = { backend: { kickLost: () => true } };
  const { error } = simulate(seed, 5000, twin);
  assert.ok(error);
  const failure = shorten(seed, 5000, error, twin);
  assert.ok(failure.steps > 0 && failure.steps < 5000);
  assert.equal(simulate(failure.seed, failure.steps, twin).error?.message, failure.message);
  assert.equal(simulate(failure.seed, failure.steps - 1, twin).error, undefined);
});
