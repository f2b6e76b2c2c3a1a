import assert from "node:assert/strict";
import { test } from "node:test";
import type { Gpa } from "../base/units.ts";
import { ringAddresses } from "./ring-addresses.ts";

const MIB = 2 ** 20;
const regions = (...extents: (readonly [gpa: number, size: number])[]) =>
  extents.map(([gpa, size]) => ({ gpa: gpa as Gpa, size, hostAddress: 0, bytes: new Uint8Array(0) }));

test("addresses are those of the RAM that begins with the second MiB", () => {
  const pc = regions([0, 0xa0000], [MIB, 511 * MIB], [2 ** 32, 1024 * MIB]);
  assert.deepEqual(ringAddresses(pc), { start: BigInt(MIB), end: BigInt(512 * MIB - 1) });
  assert.deepEqual(ringAddresses(regions([0, 8 * MIB])), { start: BigInt(MIB), end: BigInt(8 * MIB - 1) });
});

test("none, before there is such RAM", () => {
  assert.equal(ringAddresses([]), undefined);
  assert.equal(ringAddresses(regions([0, MIB], [2 * MIB, MIB])), undefined);
});
