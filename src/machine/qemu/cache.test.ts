import assert from "node:assert/strict";
import { mkdtempSync, readdirSync, readFileSync, rmSync, utimesSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, test } from "node:test";
import { cached, cachePath, digest, withCacheLock } from "./cache.ts";

const before = process.env.XDG_CACHE_HOME;
let home: string;
beforeEach(() => {
  home = mkdtempSync(join(tmpdir(), "coiommu-test-"));
  process.env.XDG_CACHE_HOME = home;
});
afterEach(() => {
  rmSync(home, { recursive: true });
  if (before === undefined) delete process.env.XDG_CACHE_HOME;
  else process.env.XDG_CACHE_HOME = before;
});

const put = (text: string) => async (folder: string) => writeFileSync(join(folder, "file"), text);

test("an entry is built once", async () => {
  const first = await cached("kind", "key", put("first"));
  assert.equal(await cached("kind", "key", put("second")), first);
  assert.equal(readFileSync(join(first, "file"), "utf8"), "first");
});

test("a build that fails leaves nothing", async () => {
  const build = async () => {
    throw new Error("no");
  };
  await assert.rejects(cached("kind", "key", build));
  assert.deepEqual(readdirSync(join(home, "coiommu/kind")), []);
});

test("two that build the same entry both get it", async () => {
  const paths = await Promise.all([cached("kind", "key", put("a")), cached("kind", "key", put("b"))]);
  assert.equal(paths[0], paths[1]);
  assert.deepEqual(readdirSync(join(home, "coiommu/kind")), ["key"]);
});

test("the entries used last are kept", async () => {
  for (const [i, key] of ["a", "b", "c"].entries()) {
    await cached("kind", key, put(key));
    utimesSync(cachePath("kind", key), i + 1, i + 1);
  }
  await cached("kind", "a", put("not built"));
  await cached("kind", "d", put("d"));
  assert.deepEqual(readdirSync(join(home, "coiommu/kind")).sort(), ["a", "c", "d"]);
});

test("the lock is held by one at a time, and the other is told", async () => {
  const order: string[] = [];
  const told = Promise.withResolvers<void>();
  let second: Promise<unknown> | undefined;
  await withCacheLock(assert.fail, async () => {
    second = withCacheLock(told.resolve, async () => order.push("second"));
    await told.promise;
    order.push("first");
  });
  await second;
  assert.deepEqual(order, ["first", "second"]);
});

test("a digest tells apart parts that join to the same text", () => {
  assert.notEqual(digest("ab", "c"), digest("a", "bc"));
});
