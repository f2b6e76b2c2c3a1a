import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import test from "node:test";
import { type BlockStore, FileStore, MemoryStore } from "./block-store.ts";

const directory = fs.mkdtempSync(path.join(os.tmpdir(), "coiommu-"));
test.after(() => fs.rmSync(directory, { recursive: true }));
const image = (size: number) => {
  const file = path.join(directory, `${size}.img`);
  fs.writeFileSync(file, "");
  fs.truncateSync(file, size);
  return file;
};

for (const [name, open] of [
  ["file", (): BlockStore => new FileStore(image(4 * 2 ** 20))],
  ["memory", (): BlockStore => new MemoryStore(8192)],
] as const)
  test(`${name}: what is written is read back, the rest is zero`, () => {
    const store = open();
    assert.equal(store.sectors, 8192);
    const data = randomBytes(3 * 2 ** 20);
    store.write(512 * 3, data);
    store.flush();
    const back = Buffer.alloc(data.length + 1024, 1);
    store.read(512 * 2, back);
    assert.ok(back.subarray(512, -512).equals(data));
    assert.ok(
      back.subarray(0, 512).every((byte) => byte === 0) && back.subarray(-512).every((byte) => byte === 0),
    );
    store.close();
  });

test("a memory disk of 1 TiB takes no more than what was written", () => {
  const store = new MemoryStore(2 ** 31);
  store.write(2 ** 40 - 512, randomBytes(512));
  store.read(2 ** 39, new Uint8Array(4096));
});

test("an image that cannot be used: one sentence", () => {
  for (const [file, sentence] of [
    [path.join(directory, "none"), /^disk image .*none does not exist$/],
    [directory, /is a directory$/],
    [image(0), /is empty$/],
    ["/dev/null", /is not a regular file$/],
  ] as const)
    assert.throws(() => new FileStore(file), { code: "ERR_COIOMMU_USER", message: sentence });
});

test("an image that became shorter: EIO, not a silent zero", () => {
  const file = image(8192);
  const store = new FileStore(file);
  fs.truncateSync(file, 4096);
  assert.throws(() => store.read(4096, new Uint8Array(512)), { errno: "EIO" });
  store.close();
  assert.throws(() => store.read(0, new Uint8Array(512)), { syscall: "read", errno: "EBADF" });
});

test("a full file system is ENOSPC", { skip: !fs.existsSync("/dev/full") }, () => {
  const store = new FileStore(image(4096));
  const full = fs.openSync("/dev/full", "r+");
  const writeSync = fs.writeSync;
  test.mock.method(fs, "writeSync", (_fd: number, ...rest: [Uint8Array]) => writeSync(full, ...rest));
  assert.throws(() => store.write(0, new Uint8Array(512)), { syscall: "write", errno: "ENOSPC" });
  test.mock.restoreAll();
  fs.closeSync(full);
});
