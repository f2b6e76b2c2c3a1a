import assert from "node:assert/strict";
import test from "node:test";
import { type Bdf, formatBdf, type Gfn, gfnOf, gpaOf, parseBdf } from "./units.ts";

for (const [gpa, gfn] of [
  [0, 0],
  [4095, 0],
  [4096, 1],
  [2 ** 44 + 1, 2 ** 32],
  [2 ** 52 - 1, 2 ** 40 - 1],
] as const)
  test(`GPA ${gpa} is in frame ${gfn}, which begins at or before it`, () => {
    assert.equal(gfnOf(gpa), gfn);
    assert.equal(gpaOf(gfn as Gfn), gpa - (gpa % 4096));
  });

for (const [text, bdf] of [
  ["00:04.0", 0x20],
  ["0000:00:04.0", 0x20],
  ["ff:1f.7", 0xffff],
  ["FF:1F.7", 0xffff],
  ["01:02.3", 0x113],
] as const)
  test(`"${text}" is BDF ${bdf}, and is formatted with its segment`, () => {
    assert.equal(parseBdf(text), bdf);
    assert.equal(parseBdf(formatBdf(bdf as Bdf)), bdf);
    assert.match(formatBdf(bdf as Bdf), /^0000:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]$/);
  });

for (const text of [
  "",
  "4",
  "00:20.0",
  "00:04.8",
  "0001:00:04.0",
  "000:04.0",
  "00:04.0 ",
  "00:4.0",
  "gg:04.0",
])
  test(`"${text}" is not a BDF`, () => assert.equal(parseBdf(text), undefined));
