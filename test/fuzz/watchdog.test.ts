import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import test from "node:test";

test("an input that does not end is written to a file, and ends the fuzzer", () => {
  const directory = mkdtempSync(path.join(tmpdir(), "coiommu-fuzz-"));
  const script = `
    const { watched } = await import(${JSON.stringify(new URL("watchdog.ts", import.meta.url).href)});
    const target = await watched({ name: "twin", run(input) { while (input[0] === 7); } }, 0.5);
    target.run(Uint8Array.of(1, 2));
    target.run(Uint8Array.of(7, 8, 9));
  `;
  const child = spawnSync(process.execPath, ["--input-type=module", "--eval", script], {
    cwd: directory,
    encoding: "utf8",
    timeout: 60_000,
  });
  assert.equal(child.signal, "SIGKILL");
  assert.match(child.stderr, /finding-twin-endless\.bin/);
  assert.deepEqual([...readFileSync(path.join(directory, "finding-twin-endless.bin"))], [7, 8, 9]);
  rmSync(directory, { recursive: true });
});
