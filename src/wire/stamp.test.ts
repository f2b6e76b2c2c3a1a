import assert from "node:assert/strict";
import test from "node:test";
import { isStamped, stamp } from "./stamp.ts";

const stamped = (length: number, number: number, generation: number): Uint8Array => {
  const bytes = new Uint8Array(length);
  stamp(bytes, number, generation);
  return bytes;
};

for (const length of [16, 17, 512, 1499])
  test(`${length} stamped bytes are recognised, and one wrong bit anywhere is not overlooked`, () => {
    const bytes = stamped(length, 2 ** 33 + 7, 3);
    assert.ok(isStamped(bytes, 2 ** 33 + 7, 3));
    for (let bit = 0; bit < 8 * length; bit += 5) {
      bytes[bit >> 3]! ^= 1 << (bit & 7);
      assert.equal(isStamped(bytes, 2 ** 33 + 7, 3), false, `bit ${bit}`);
      bytes[bit >> 3]! ^= 1 << (bit & 7);
    }
  });

test("another number or generation has other contents behind the head too", () => {
  const one = stamped(512, 1, 1);
  for (const other of [stamped(512, 2, 1), stamped(512, 1, 2), stamped(512, 2 ** 32 + 1, 1)])
    assert.notDeepEqual(one.subarray(16), other.subarray(16));
});

test("what lies at another position is not recognised, whatever its head says", () => {
  const bytes = stamped(512, 1, 1);
  bytes.copyWithin(256, 128, 256);
  assert.equal(isStamped(bytes, 1, 1), false);
});
