import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import test from "node:test";
import { promisify } from "node:util";

const COIOMMU = new URL("../../bin/coiommu.js", import.meta.url).pathname;
const coiommu = (...args: string[]) => promisify(execFile)(process.execPath, [COIOMMU, "sim", ...args]);

test("sim plays seeds, and gives what happened as JSON", async () => {
  const { stdout } = await coiommu("--seed", "5", "--seeds", "3", "--steps", "2000", "--json", "-");
  const result = JSON.parse(stdout);
  assert.deepEqual([result.schema, result.seed, result.seeds], ["coiommu.sim/1", 5, 3]);
  assert.deepEqual([result.stepsPerSeed, result.failure], [2000, null]);
  assert.ok(result.statistics.steps >= 6000 && result.stepsPerSecond > 0);
});

test("sim shows a table", async () => {
  const { stdout } = await coiommu("--seed", "5", "--steps", "500");
  assert.match(stdout, /seed 5[\s\S]*pin requests[\s\S]*steps per second/);
});

for (const args of [["--seed", "x"], ["--steps", "-1"], ["--seeds", "0"], ["--nothing"]])
  test(`sim ${args.join(" ")} is refused with wrong usage`, () =>
    assert.rejects(coiommu(...args), { code: 2 }));
