import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import test from "node:test";

const LISTS = "/var/lib/apt/lists";
/** Hides that folder, in a mount namespace of its own. */
const HIDDEN = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs tmpfs /var/lib/apt && exec "$@"', "sh"];
const before = existsSync(LISTS) ? HIDDEN : [];
const cannot = before.length > 0 && spawnSync("unshare", ["-m", "true"]).status !== 0;

test("a machine without apt has no lists of packages, and no look-up of them is known", {
  skip: cannot && "needs root",
}, (t) => {
  const cache = mkdtempSync(join(tmpdir(), "coiommu-"));
  t.after(() => rmSync(cache, { recursive: true }));
  const load = (path: string) => `await import(${JSON.stringify(import.meta.resolve(path))})`;
  const child = `
    const { Apt } = ${load("./apt.ts")};
    const { knownSelection } = ${load("./selection.ts")};
    console.log(Apt.hasLists(), knownSelection());`;
  const command = [...before, process.execPath, "--input-type=module", "-e", child];
  const env = { ...process.env, XDG_CACHE_HOME: cache };
  const run = spawnSync(command[0]!, command.slice(1), { encoding: "utf8", env });
  assert.equal(run.stdout, "false undefined\n", run.stderr);
});
