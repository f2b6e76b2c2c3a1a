import assert from "node:assert/strict";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import test, { type TestContext } from "node:test";
import type { Gfn, Nanoseconds } from "../base/units.ts";
import { GfnBuffer } from "../policy/policy.ts";
import { choosePolicy } from "./policy-choice.ts";

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

test("regression: a create() that throws is wrong usage, not the end of the program", (t) => {
  const file = fileWith(t, entry("throw new Error('my mistake');"));
  assert.throws(() => choosePolicy(file), {
    ...{ code: "ERR_COIOMMU_USER", exitCode: 2, message: /create\(\) has failed: Error: my mistake/ },
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
