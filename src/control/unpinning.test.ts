import assert from "node:assert/strict";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import test, { type TestContext } from "node:test";
import { active, idle } from "../../test/support/machine.ts";
import { milliseconds, type Nanoseconds } from "../base/units.ts";
import { counters, countersBuffer } from "../memory/counters.ts";
import type { IntervalChoice } from "../policy/pass-interval.ts";
import { TRACKING_COUNTERS } from "../tracking/tracker.ts";
import { Unpinning } from "./unpinning.ts";

function fileWith(t: TestContext, name: string, text: string): string {
  const folder = mkdtempSync(path.join(tmpdir(), "coiommu-unpinning-"));
  t.after(() => rmSync(folder, { recursive: true }));
  const file = path.join(folder, name);
  writeFileSync(file, text);
  return file;
}

/** A guest with an active driver, whose idle frames are unpinned as `policy` and `interval` say. */
function unpinned(policy: string, interval: IntervalChoice = milliseconds(10)) {
  const warnings: string[] = [];
  const shared = counters(TRACKING_COUNTERS, countersBuffer(TRACKING_COUNTERS));
  const unpinning = new Unpinning({ policy, interval }, shared, 0 as Nanoseconds, (text) =>
    warnings.push(text),
  );
  const m = active({ ...unpinning.ofTracker, counters: shared });
  /** For so many ms, a look every ms. */
  const run = (ms: number) => {
    for (let i = 0; i < ms; i++) {
      m.clock.time += milliseconds(1);
      unpinning.work(m.tracker, m.clock);
    }
  };
  return { ...m, counters: shared, unpinning, warnings, run };
}

for (const method of ["pinned", "tried", "candidates"])
  test(`a policy of a file that throws in ${method}() is told once, and lru takes its place`, (t) => {
    const methods = ["pinned", "tried", "candidates"].map((m) =>
      m === method
        ? `${m}() { throw new Error("my mistake"); }`
        : m === "candidates"
          ? "candidates(_: number, __: object, out: { push(gfn: number): void }) { for (let i = 0; i < 3; i++) out.push(i); }"
          : `${m}() {}`,
    );
    const mine = `export default { name: "mine", summary: "", source: "", parameters: {}, create: () => ({ ${methods} }) };`;
    const m = unpinned(fileWith(t, "mine.ts", mine));
    idle(m, 1, 2);
    m.run(100);
    assert.equal(m.warnings.length, 1);
    assert.match(m.warnings[0]!, /mine\.ts has failed, and policy lru takes its place: Error: my mistake/);
    assert.deepEqual([m.tracker.policy.name, m.tracker.pinned], ["lru", 0]);
  });

for (const method of ["state", "pressureFile"])
  test(`regression: a policy of a file that throws in ${method}() later is told once, and lru takes its place`, (t) => {
    const mine = `let calls = 0;
      const later = () => { if (++calls > 4) throw new Error("my mistake"); return ${method === "state" ? "{}" : "undefined"}; };
      const create = () => ({ ${method}: later, pinned() {}, tried() {}, candidates() {} });
      export default { name: "mine", summary: "", source: "", parameters: {}, create };`;
    const m = unpinned(fileWith(t, "mine.ts", mine));
    idle(m, 1, 2);
    for (let i = 0; i < 200; i++) {
      m.tracker.policy.state?.();
      m.run(1);
    }
    assert.equal(m.warnings.length, 1);
    assert.match(m.warnings[0]!, /policy lru takes its place: Error: my mistake/);
    assert.deepEqual([m.tracker.policy.name, m.tracker.pinned], ["lru", 0]);
  });

test("pressure: what is idle stays while the file says that there is memory, and goes when it says that there is none", (t) => {
  const psi = (avg10: string) => `some avg10=${avg10} avg60=0.00 avg300=0.00 total=0\n`;
  const file = fileWith(t, "memory.pressure", psi("0.00"));
  const m = unpinned(`pressure,file=${file}`);
  idle(m, 1, 2, 3);
  m.run(100);
  assert.equal(m.tracker.pinned, 3);
  writeFileSync(file, psi("40.00"));
  m.run(100);
  assert.equal(m.tracker.pinned, 0);
  // A cgroup that is removed takes its file along.
  idle(m, 4);
  writeFileSync(file, "");
  m.run(100);
  assert.equal(m.tracker.pinned, 1);
  assert.deepEqual(m.warnings.length, 1);
  assert.match(m.warnings[0]!, /no memory pressure is seen any more: read: EINVAL/);
});

test("parameters change while the policy keeps what it knows; another one learns it anew", () => {
  const m = unpinned("clock,passes=1000");
  idle(m, ...Array.from({ length: 100 }, (_, i) => i));
  m.run(100);
  assert.ok(m.tracker.pinned > 90, "a frame or two in each pass");
  const before = m.tracker.policy;
  m.unpinning.setPolicy(m.tracker, "clock,passes=1");
  assert.ok(m.tracker.policy === before && before.parameters.passes === 1);
  m.run(40);
  assert.equal(m.tracker.pinned, 0);
  idle(m, 7);
  m.unpinning.setPolicy(m.tracker, "generations");
  assert.notEqual(m.tracker.policy, before);
  m.run(60);
  assert.equal(m.tracker.pinned, 0);
});

test("the interval is told to observers, follows what passes find, and is set live", () => {
  const m = unpinned("lru", { min: milliseconds(20), max: milliseconds(2000) });
  assert.equal(m.counters.passInterval, milliseconds(300));
  idle(m, ...Array.from({ length: 100 }, (_, i) => i));
  m.run(1000);
  assert.equal(m.tracker.pinned, 0);
  assert.ok(m.counters.passInterval < milliseconds(300), `${m.counters.passInterval} ns`);
  m.unpinning.setInterval(milliseconds(50));
  assert.equal(m.counters.passInterval, milliseconds(50));
  const { passes } = m.counters;
  m.run(500);
  assert.ok(Math.abs(m.counters.passes - passes - 10) <= 1, `${m.counters.passes - passes} passes in 500 ms`);
});
