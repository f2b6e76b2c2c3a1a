import assert from "node:assert/strict";
import { test } from "node:test";
import { random } from "../../../../test/support/random.ts";
import { Latencies } from "./latencies.ts";

test("percentiles of random times are exact to one part in sixteen", () => {
  const next = random(1);
  const latencies = new Latencies();
  const times = Array.from({ length: 5000 }, () => next(2 ** (1 + next(40))));
  for (const time of times) latencies.record(time);
  times.sort((a, b) => a - b);
  for (const p of [0.001, 0.5, 0.9, 0.99, 1]) {
    const exact = times[Math.ceil(times.length * p) - 1]!;
    const found = latencies.percentile(p)!;
    assert.ok(found >= exact && found <= exact + exact / 16, `p${p}: ${found}, exactly ${exact}`);
  }
});

test("small times are exact, endless ones have the last bucket, and none has no percentile", () => {
  const latencies = new Latencies();
  assert.equal(latencies.percentile(0.5), undefined);
  for (let ns = 0; ns < 32; ns++) {
    const one = new Latencies();
    one.record(ns);
    assert.equal(one.percentile(0.5), ns);
    latencies.add(one.counts);
  }
  assert.equal(latencies.percentile(0.5), 15);
  latencies.record(2 ** 60);
  latencies.record(Number.POSITIVE_INFINITY);
  assert.ok(latencies.percentile(1)! > 2 ** 47);
});
