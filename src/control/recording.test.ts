import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import test from "node:test";
import { Recording } from "./recording.ts";

test("regression: what is pinned before the header is known stands behind it, in its order", (t) => {
  const folder = mkdtempSync(path.join(tmpdir(), "coiommu-recording-"));
  t.after(() => rmSync(folder, { recursive: true }));
  const file = path.join(folder, "run.log");
  const recording = new Recording(file, 0, (text) => assert.fail(text));
  recording.write("1 - - pinned 0+256\n");
  recording.write("2 - - pinned 100+256\n");
  recording.head({ memoryMiB: 64, machine: "qemu", workload: "idle" });
  recording.write("3 - - unpinned 0\n");
  recording.close();
  const [header, ...lines] = readFileSync(file, "latin1").trimEnd().split("\n");
  assert.equal(JSON.parse(header!).memoryMiB, 64);
  assert.deepEqual(lines, ["1 - - pinned 0+256", "2 - - pinned 100+256", "3 - - unpinned 0"]);
});
