import assert from "node:assert/strict";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import test, { type TestContext } from "node:test";
import { active, idle } from "../../test/support/machine.ts";
import { type Gfn, milliseconds, type Nanoseconds } from "../base/units.ts";
import { counters, countersBuffer } from "../memory/counters.ts";
import { GfnBuffer } from "../policy/policy.ts";
import { TRACKING_COUNTERS } from "../tracking/tracker.ts";
import { choosePolicy } from "./policy-choice.ts";
import { Unpinning } from "./unpinning.ts";

function fileWith(t: TestContext, text: string): string {
  const folder = mkdtempSync(path.join(tmpdir(), "coiommu-policy-"));
  t.after(() => rmSync(folder, { recursive: true }));
  const file = path.join(folder, "mine.ts");
  writeFileSync(file, text);
  return file;
}

const entry = (create: string) => `
  const policy: object = {
    name: "mine",
    summary: "the last one first",
    source: "a test",
    parameters: { depth: { kind: "count", default: 2, min: 1, max: 9, summary: "how many" } },
    create: (values: { depth: number }) => { ${create} },
  };
  export default policy;
`;
const STACK = `
  const frames: number[] = [];
  return {
    pinned: (gfn: number) => void frames.push(gfn),
    tried() {},
    candidates(_now: number, _limit: object, out: { push(gfn: number): void }) {
      for (const gfn of frames.splice(-values.depth)) out.push(gfn);
    },
  };
`;

test("a policy of a file, in TypeScript, with parameters", (t) => {
  const file = fileWith(t, entry(STACK));
  const policy = choosePolicy(`${file},depth=1`);
  assert.deepEqual([policy.name, policy.parameters], ["mine", { depth: 1 }]);
  for (const gfn of [4, 7]) policy.pinned(gfn as Gfn, 1 as Nanoseconds);
  const out = new GfnBuffer(4);
  policy.candidates(2 as Nanoseconds, { framesMax: 4, pressure: 0 }, out);
  assert.deepEqual([out.length, out.at(0)], [1, 7]);
  assert.throws(() => choosePolicy(`${file},depth=10`), {
    exitCode: 2,
    message: /depth takes a whole number/,
  });
});

for (const [what, text, message] of [
  ["with a syntax error", "export default {", /cannot be loaded/],
  ["without a default export", "export const policy = 1;", /its default export must be/],
  [
    "with parameters of no kind",
    "export default { name: 'x', parameters: { a: 1 }, create() {} };",
    /default export/,
  ],
] as const)
  test(`a file ${what} is wrong usage`, (t) => {
    const file = fileWith(t, text);
    assert.throws(() => choosePolicy(file), { code: "ERR_COIOMMU_USER", exitCode: 2, message });
  });

test("a file that is not there, and pressure that cannot be read, are wrong usage", () => {
  assert.throws(() => choosePolicy("./nowhere.ts"), {
    exitCode: 2,
    message: /\.\/nowhere\.ts: there is no such file/,
  });
  assert.throws(() => choosePolicy("pressure,file=/nowhere"), { exitCode: 2, message: /ENOENT.*CONFIG_PSI/ });
});

for (const method of ["pinned", "tried", "candidates"])
  test(`a policy of a file that throws in ${method}() is told once, and lru takes its place`, (t) => {
    const methods = ["pinned", "tried", "candidates"].map((m) =>
      m === method
        ? `${m}() { throw new Error("my mistake"); }`
        : m === "candidates"
          ? "candidates(_: number, __: object, out: { push(gfn: number): void }) { for (let i = 0; i < 3; i++) out.push(i); }"
          : `${m}() {}`,
    );
    const file = fileWith(t, entry(`return { ${methods} };`));
    const warnings: string[] = [];
    const shared = counters(TRACKING_COUNTERS, countersBuffer(TRACKING_COUNTERS));
    const options = { policy: file, interval: milliseconds(1) };
    const unpinning = new Unpinning(options, shared, 0 as Nanoseconds, (warning) => warnings.push(warning));
    const m = active({ ...unpinning.ofTracker, counters: shared });
    idle(m, 1, 2);
    for (let slice = 1; slice < 40; slice++) {
      m.clock.time += milliseconds(1);
      unpinning.work(m.tracker, m.clock);
    }
    assert.equal(warnings.length, 1);
    assert.match(warnings[0]!, /mine\.ts has failed, and policy lru takes its place: Error: my mistake/);
    assert.deepEqual([m.tracker.policy.name, m.tracker.pinned], ["lru", 0]);
  });
