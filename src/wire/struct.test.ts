import assert from "node:assert/strict";
import test from "node:test";
import {
  bytes,
  completedBy,
  getUint,
  le16,
  le32,
  le64,
  le64bits,
  putUint,
  struct,
  u8,
  wordsOf,
} from "./struct.ts";

const layout = struct("pair", 12, { low: le64(0), high: le32(8) });

for (const [what, declare] of [
  ["a gap", () => struct("s", 8, { a: le16(0), b: le32(4) })],
  ["a gap at the start", () => struct("s", 4, { a: le16(2) })],
  ["an overlap", () => struct("s", 6, { a: le32(0), b: le32(2) })],
  ["two fields at the same place", () => struct("s", 4, { a: le32(0), b: u8(0) })],
  ["a size that is too large", () => struct("s", 8, { a: le32(0) })],
  ["a size that is too small", () => struct("s", 3, { a: le32(0) })],
] as const)
  test(`a layout with ${what} is refused when it is declared`, () => assert.throws(declare, TypeError));

test("fields may be declared in any order", () => {
  assert.equal(struct("s", 6, { b: le16(4), a: le32(0) }).size, 6);
});

test("write leaves absent fields and the bytes around the struct as they are", () => {
  const to = new Uint8Array(16).fill(0xaa);
  layout.write(to, { high: 0x04030201 }, 2);
  assert.equal(Buffer.from(to).toString("hex"), "aaaaaaaaaaaaaaaaaaaa01020304aaaa");
});

test("read sees through the view's offset, and copies byte fields", () => {
  const backing = Uint8Array.from([9, 9, 1, 2, 3]);
  const s = struct("s", 3, { tag: u8(0), body: bytes(2)(1) });
  const value = s.read(backing.subarray(2));
  backing.fill(0);
  assert.deepEqual(value, { tag: 1, body: Uint8Array.of(2, 3) });
});

test("encode appends zeroes for what follows the struct", () => {
  assert.deepEqual([...layout.encode({ low: 1 }, 3)], [1, ...new Array(14).fill(0)]);
});

test("fields are found by words of 32 bits, and one that begins between two is refused", () => {
  assert.deepEqual(wordsOf(layout), { low: 0, high: 2 });
  assert.throws(() => wordsOf(struct("s", 6, { a: le16(0), b: le32(2) })), TypeError);
});

const raw64 = (value: bigint) => {
  const raw = new Uint8Array(8);
  new DataView(raw.buffer).setBigUint64(0, value, true);
  return raw;
};

for (const value of [0n, 1n, 0xffff_ffffn, 0x1_0000_0000n, 0xff_ffff_ffff_f000n, 2n ** 53n - 1n])
  test(`le64 is exact for 0x${value.toString(16)}`, () => {
    const s = struct("s", 8, { x: le64(0) });
    assert.equal(BigInt(s.read(raw64(value)).x), value);
    assert.deepEqual(s.encode({ x: Number(value) }), raw64(value));
  });

for (const value of [2n ** 53n, 2n ** 53n + 1n, 2n ** 63n, 2n ** 63n + 2n ** 62n + 1n, 2n ** 64n - 1n])
  test(`le64 reads hostile 0x${value.toString(16)} as a number that is 2^53 or above`, () => {
    const { x } = struct("s", 8, { x: le64(0) }).read(raw64(value));
    assert.ok(x >= 2 ** 53 && x <= 2 ** 64);
    const again = BigInt(struct("s", 8, { x: le64(0) }).read(struct("s", 8, { x: le64(0) }).encode({ x })).x);
    assert.ok(again >= 2n ** 53n, "also after it was written and read again");
  });

test("le64bits keeps every bit", () => {
  const s = struct("s", 8, { x: le64bits(0) });
  for (const x of [2n ** 64n - 1n, 2n ** 53n + 1n, 0x0102_0304_0506_0708n])
    assert.equal(s.read(s.encode({ x })).x, x);
});

test("getUint and putUint are little-endian, for each size of a register access", () => {
  for (const [size, hex, value] of [
    [1, "f1", 0xf1n],
    [2, "f1e2", 0xe2f1n],
    [4, "f1e2d3c4", 0xc4d3_e2f1n],
    [8, "f1e2d3c4b5a69788", 0x8897_a6b5_c4d3_e2f1n],
  ] as const) {
    const to = new Uint8Array(size + 2);
    putUint(to, 1, size, value);
    assert.equal(Buffer.from(to).toString("hex"), `00${hex}00`);
    assert.equal(getUint(to, 1, size), value);
  }
});

test("getUint reads what lies beyond the buffer as zero; putUint drops it", () => {
  const small = Uint8Array.of(1, 2);
  assert.equal(getUint(small, 1, 4), 2n);
  putUint(small, 1, 4, 0xffff_ffffn);
  assert.deepEqual([...small], [1, 0xff]);
});

for (const [at, size, completed] of [
  [0, 4, []],
  [4, 4, ["low"]],
  [0, 8, ["low"]],
  [7, 1, ["low"]],
  [8, 2, []],
  [10, 2, ["high"]],
  [0, 12, ["low", "high"]],
  [6, 6, ["low", "high"]],
  [12, 4, []],
] as const)
  test(`a write of ${size} bytes at ${at} completes [${completed}]: the fields whose last byte it holds`, () =>
    assert.deepEqual([...completedBy(layout, at, size)], completed));
