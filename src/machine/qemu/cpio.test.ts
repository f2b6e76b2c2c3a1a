import assert from "node:assert/strict";
import { test } from "node:test";
import { packCpio } from "./cpio.ts";

test("newc: headers, names and contents are padded to four bytes", () => {
  const archive = packCpio([
    { name: "d", folder: true },
    { name: "d/f", contents: Buffer.from("hello") },
    { name: "l", link: "d/f" },
  ]).toString("latin1");
  const found = [];
  for (let at = 0; at < archive.length; ) {
    assert.equal(archive.slice(at, at + 6), "070701");
    const field = (index: number) =>
      Number.parseInt(archive.slice(at + 6 + 8 * index, at + 14 + 8 * index), 16);
    const align = (n: number) => (n + 3) & ~3;
    const start = align(at + 110 + field(11));
    found.push([
      archive.slice(at + 110, at + 109 + field(11)),
      field(1).toString(8),
      archive.slice(start, start + field(6)),
    ]);
    at = align(start + field(6));
  }
  assert.deepEqual(found, [
    ["d", "40755", ""],
    ["d/f", "100755", "hello"],
    ["l", "120777", "d/f"],
    ["TRAILER!!!", "0", ""],
  ]);
});
