import assert from "node:assert/strict";
import test from "node:test";
import * as dtt from "./dtt.ts";
import { entryOffset, entryTarget, gfnCapacity, unitOffset } from "./dtt.ts";

test("the bits of a tracking unit are those of abi.md section 1, without gap or overlap", () => {
  const { TU_COUNT, TU_RESERVED, TU_DIRTY, TU_WRITABLE, TU_ACCESSED, TU_PINNED } = dtt;
  assert.deepEqual(
    [TU_COUNT, TU_RESERVED, TU_DIRTY, TU_WRITABLE, TU_ACCESSED, TU_PINNED],
    [0xffff, 0x0fff_0000, 2 ** 28, 2 ** 29, 2 ** 30, 2 ** 31],
  );
  assert.equal(TU_COUNT + TU_RESERVED + TU_DIRTY + TU_WRITABLE + TU_ACCESSED + TU_PINNED, 2 ** 32 - 1);
});

test("tables fill a page: 512 entries of 8 bytes, 1,024 units of 4 bytes", () => {
  assert.equal(2 ** dtt.ENTRY_BITS * dtt.ENTRY_SIZE, dtt.TABLE_SIZE);
  assert.equal(2 ** dtt.LEAF_BITS * dtt.UNIT_SIZE, dtt.TABLE_SIZE);
});

for (const [why, low, high, target] of [
  ["present, first page", 0x0000_0001, 0, 0],
  ["present, below 4 GiB", 0xffff_f001, 0, 0xffff_f000],
  ["present, above 4 GiB", 0x1234_5001, 0x1, 0x1_1234_5000],
  ["present, the highest GPA: bits 12 to 51", 0xffff_f001, 0x000f_ffff, 2 ** 52 - 4096],
  ["absent", 0x1234_5000, 0, undefined],
  ["all zero", 0, 0, undefined],
  ["reserved bit 1", 0x1234_5003, 0, undefined],
  ["reserved bit 11", 0x1234_5801, 0, undefined],
  ["reserved bit 52", 0x1234_5001, 0x0010_0000, undefined],
  ["reserved bit 63", 0x1234_5001, 0x8000_0000, undefined],
  ["all ones", 0xffff_ffff, 0xffff_ffff, undefined],
] as const)
  test(`entryTarget: ${why}, also from the signed words that atomics give`, () => {
    assert.equal(entryTarget(low, high), target);
    assert.equal(entryTarget(low | 0, high | 0), target);
  });

for (const [gfn, level, index] of [
  [0, 2, 0],
  [1023, 2, 0],
  [1024, 2, 1],
  [1024 * 511, 2, 511],
  [1024 * 512, 2, 0],
  [1024 * 512, 3, 1],
  [2 ** 28, 4, 1],
  [2 ** 37, 5, 1],
  [2 ** 40 - 1, 5, 7],
  [2 ** 40 - 1, 4, 511],
] as const)
  test(`frame ${gfn} is at entry ${index} of level ${level}`, () => {
    assert.equal(entryOffset(gfn, level), 8 * index);
    // The formula of abi.md section 1, in exact arithmetic.
    assert.equal(BigInt(index), (BigInt(gfn) >> BigInt(10 + 9 * (level - 2))) & 511n);
  });

for (const [gfn, offset] of [
  [0, 0],
  [1023, 4092],
  [1024, 0],
  [2 ** 32 + 5, 20],
  [2 ** 40 - 1, 4092],
] as const)
  test(`the unit of frame ${gfn} is at ${offset} of its leaf`, () => assert.equal(unitOffset(gfn), offset));

test("1 to 5 levels hold 4 MiB, 2 GiB, 1 TiB, 512 TiB, 256 PiB of guest", () => {
  assert.deepEqual([1, 2, 3, 4, 5].map(gfnCapacity), [2 ** 10, 2 ** 19, 2 ** 28, 2 ** 37, 2 ** 46]);
});
