import assert from "node:assert/strict";
import { test } from "node:test";
import { EarlyUnmap } from "../../../../test/support/dma.ts";
import { flipping } from "../../../../test/support/flip.ts";
import { type GpuRigOptions, gpuParts } from "../../../../test/support/gpu.ts";
import { guestOf, runWorkload } from "../../../../test/support/workload.ts";
import { parseGpuWorkload } from "../../workload-text.ts";
import { GpuWorkload } from "./gpu.ts";
import { report } from "./workload.ts";

interface Options extends GpuRigOptions {
  readonly failEvery?: number;
  readonly seed?: number;
  readonly stopAt?: number;
}

function run(text: string, { failEvery, seed, stopAt, ...options }: Options = {}) {
  const r = gpuParts(options);
  const parsed = { ...parseGpuWorkload(text), seconds: 1 };
  const workload = new GpuWorkload({ guest: guestOf(r, seed), port: r.gpu, workload: parsed, ringSize: 16 });
  r.gpu.start(workload.driver);
  r.dma.failEvery = failEvery ?? r.dma.failEvery;
  const attempts = r.dma.attempts;
  runWorkload(workload, r.gpu, (n) => n === stopAt && workload.stop());
  const bindings = r.dma.attempts - attempts - workload.measurement.mapFailures;
  return { ...r, ...workload.measurement, bindings, report: report([workload.measurement]) };
}

for (const text of ["gpu:buffers=3,size=256k,hold=100", "gpu:buffers=1,size=1M,hold=300,iodepth=1"])
  test(`${text}: what was copied is where it was copied to, and nothing stays mapped`, () => {
    const r = run(text);
    const { buffers, size, holdMs } = parseGpuWorkload(text);
    assert.deepEqual([r.mismatches, r.errors, r.counters.faults, r.counters.errors], [0, 0, 0, 0]);
    assert.ok(r.ops > 100, `${r.ops} copies`);
    assert.ok(r.bindings >= (buffers * 700) / holdMs, "buffers are replaced");
    assert.equal(r.compared, (r.bindings * size) / 512);
    assert.equal(r.dma.mapped.bidirectional >= r.bindings * size, true);
    assert.deepEqual([r.dma.live, r.pages.used, r.report.verified], [0, 0, true]);
  });

test("the same seed makes the same copies, another makes others", () => {
  const [a, b, c] = [1, 1, 2].map((seed) => run("gpu:buffers=2,size=64k", { seed }));
  assert.deepEqual([a!.bytes, a!.ops], [b!.bytes, b!.ops]);
  assert.notEqual(a!.bytes, c!.bytes);
});

test("one binding of two fails: it is bound later", () => {
  const r = run("gpu:buffers=2,size=128k,hold=50", { failEvery: 2 });
  assert.deepEqual([r.mismatches, r.errors, r.dma.live], [0, 0, 0]);
  assert.ok(r.mapFailures > 10 && r.ops > 50);
});

for (const stopAt of [0, 3, 50])
  test(`stopped after ${stopAt} steps: everything is unmapped and freed`, () => {
    const r = run("gpu:buffers=2,size=1M", { stopAt });
    assert.deepEqual([r.mismatches, r.dma.live, r.pages.used], [0, 0, 0]);
  });

test("broken twin: a driver that unmaps too early gets errors, and compares nothing that failed", () => {
  const r = run("gpu:buffers=2,size=64k", { Dma: EarlyUnmap });
  assert.ok(r.counters.faults > 0);
  assert.deepEqual([r.ops, r.errors, r.mismatches], [0, r.counters.faults, 0]);
});

test("broken twin: a copy engine with one wrong bit in many copies is noticed", () => {
  const r = run("gpu:buffers=2,size=256k,hold=200", { access: flipping(100) });
  assert.ok(r.mismatches > 0);
  assert.equal(r.report.verified, false);
});
