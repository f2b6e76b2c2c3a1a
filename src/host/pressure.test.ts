import assert from "node:assert/strict";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import test from "node:test";
import { memoryPressure } from "./pressure.ts";

function fileWith(t: { after(f: () => void): void }, text: string): string {
  const folder = mkdtempSync(path.join(tmpdir(), "coiommu-psi-"));
  t.after(() => rmSync(folder, { recursive: true }));
  const file = path.join(folder, "memory.pressure");
  writeFileSync(file, text);
  return file;
}

for (const [avg10, share] of [
  ["0.00", 0],
  ["12.50", 0.125],
  ["100.00", 1],
] as const)
  test(`"some avg10=${avg10}" is ${share}`, (t) => {
    const text = `some avg10=${avg10} avg60=3.00 avg300=1.00 total=1\nfull avg10=99.00 avg60=0.00 avg300=0.00 total=0\n`;
    assert.equal(memoryPressure(fileWith(t, text)), share);
  });

test("a file of another form, or none, is a HostError", (t) => {
  assert.throws(() => memoryPressure(fileWith(t, "full avg10=1.00\n")), { errno: "EINVAL" });
  assert.throws(() => memoryPressure("/nowhere"), { errno: "ENOENT", syscall: "open" });
});
