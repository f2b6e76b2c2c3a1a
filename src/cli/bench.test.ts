import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import test from "node:test";
import { fileURLToPath } from "node:url";

const PROGRAM = fileURLToPath(new URL("../../bin/coiommu.js", import.meta.url));

test("`coiommu bench` says which experiments there are, where it is not given one", () => {
  for (const args of [[], ["nope"], ["vfio", "--rounds", "x"]]) {
    const { status, stderr } = spawnSync(process.execPath, [PROGRAM, "bench", ...args], { encoding: "utf8" });
    assert.deepEqual(
      [status, /^usage: coiommu bench NAME/m.test(stderr), /vfio/.test(stderr)],
      [2, true, true],
      stderr,
    );
  }
});
