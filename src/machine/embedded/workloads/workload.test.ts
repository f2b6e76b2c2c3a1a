import assert from "node:assert/strict";
import { test } from "node:test";
import { Latencies } from "./latencies.ts";
import { measurement, report } from "./workload.ts";

test("the report of several vCPUs is that of one machine", () => {
  const parts = [1, 3].map((factor) => {
    const latencies = new Latencies();
    latencies.record(factor * 10_000);
    return Object.assign(measurement(latencies), {
      ...{ ops: 100 * factor, bytes: 4096 * factor, nanoseconds: 1e9 + factor * 1e9 },
      ...{ errors: factor, compared: 5, mismatches: 0 },
    });
  });
  const { latencyUs, ...rest } = report(parts);
  assert.deepEqual(rest, { ops: 400, iops: 100, bytesPerSecond: 4096, verified: true, errors: 4 });
  assert.ok(latencyUs!.p50 < 11 && latencyUs!.p99 > 29);
  parts[1]!.mismatches = 1;
  assert.equal(report(parts).verified, false);
});

test("what was not measured is null, and nothing is divided by zero", () => {
  assert.deepEqual(report([measurement(new Latencies())]), {
    ...{ ops: 0, iops: 0, bytesPerSecond: 0, latencyUs: null, verified: null, errors: 0 },
  });
});
