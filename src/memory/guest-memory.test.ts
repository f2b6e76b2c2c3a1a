import assert from "node:assert/strict";
import test from "node:test";
import { HOST_BASE, ramRegion } from "../../test/support/guest.ts";
import type { Gpa } from "../base/units.ts";
import { GuestMemory, type GuestRegion } from "./guest-memory.ts";

const NOT_RAM = { code: "ERR_COIOMMU_NOT_GUEST_RAM" };
/** Two adjacent regions at 1 MiB, a hole of one frame, a third; and one that begins above 4 GiB. */
const LOW = 0x10_0000;
const regions = () => [
  ramRegion(LOW, 2),
  ramRegion(LOW + 0x2000, 1),
  ramRegion(LOW + 0x4000, 1),
  ramRegion(2 ** 40, 1, HOST_BASE + 0x5000),
];
const memory = () => new GuestMemory(regions());
const pattern = (length: number) => Uint8Array.from({ length }, (_, i) => i % 251);

function roundTrip(m: GuestMemory, gpa: number, length: number): void {
  const bytes = pattern(length);
  const back = new Uint8Array(length);
  m.write(gpa, bytes);
  m.read(gpa, back);
  assert.deepEqual(back, bytes);
}

for (const [what, gpa, length] of [
  ["the first byte of a region", LOW, 1],
  ["the last byte of a region", LOW + 0x4fff, 1],
  ["a whole region", LOW + 0x4000, 4096],
  ["bytes across two adjacent regions", LOW + 0x1ff0, 32],
  ["two adjacent regions as a whole", LOW, 0x3000],
  ["bytes above 4 GiB", 2 ** 40 + 5, 100],
  ["no bytes", LOW, 0],
] as const)
  test(`read gives what write put: ${what}`, () => roundTrip(memory(), gpa, length));

for (const [what, gpa, length] of [
  ["before the first region", LOW - 1, 1],
  ["into the first region from below", LOW - 1, 2],
  ["beyond the end of the last frame of a region", LOW + 0x2fff, 2],
  ["across a hole", LOW + 0x2000, 0x3000],
  ["in a hole", LOW + 0x3000, 8],
  ["beyond all RAM", 2 ** 40 + 4096, 1],
  ["above 2^52", 2 ** 52, 1],
  ["at 2^64, as a hostile all-ones address is read", 2 ** 64, 8],
] as const)
  test(`nothing is transferred ${what}`, () => {
    const m = memory();
    const into = new Uint8Array(length).fill(0xee);
    let pieces = 0;
    assert.throws(() => m.read(gpa, into), NOT_RAM);
    assert.throws(() => m.write(gpa, pattern(length).fill(0xdd)), NOT_RAM);
    assert.throws(() => m.transfer(gpa, length, () => pieces++), NOT_RAM);
    assert.ok(into.every((b) => b === 0xee));
    assert.ok(m.regions.every((r) => r.bytes.every((b) => b === 0)));
    assert.equal(pieces, 0);
    assert.equal(m.find(gpa, length), undefined);
    assert.throws(() => new GuestMemory().read(gpa, into), NOT_RAM);
  });

test("a length of 4 GiB is refused without a long loop", () => {
  assert.throws(() => memory().transfer(LOW, 2 ** 32 - 1, () => {}), NOT_RAM);
});

test("transfer gives pieces in place, in order, with the bytes done before each", () => {
  const m = memory();
  const pieces: [number, number][] = [];
  m.transfer(LOW + 0x1fff, 3, (piece, done) => {
    pieces.push([piece.length, done]);
    piece.fill(7);
  });
  assert.deepEqual(pieces, [
    [1, 0],
    [2, 1],
  ]);
  assert.deepEqual([m.regions[0]!.bytes.at(-1), m.regions[1]!.bytes[0], m.regions[1]!.bytes[1]], [7, 7, 7]);
});

const atomics: readonly [string, 2 | 4, (m: GuestMemory, gpa: number) => unknown][] = [
  ["load16", 2, (m, gpa) => m.load16(gpa)],
  ["store16", 2, (m, gpa) => m.store16(gpa, 1)],
  ["load32", 4, (m, gpa) => m.load32(gpa)],
  ["peek32", 4, (m, gpa) => m.peek32(gpa)],
  ["store32", 4, (m, gpa) => m.store32(gpa, 1)],
  ["add32", 4, (m, gpa) => m.add32(gpa, 1)],
  ["or32", 4, (m, gpa) => m.or32(gpa, 1)],
  ["and32", 4, (m, gpa) => m.and32(gpa, 1)],
  ["compareExchange32", 4, (m, gpa) => m.compareExchange32(gpa, 0, 1)],
];
for (const [name, size, access] of atomics) {
  test(`${name} reaches the first and the last word of a region`, () => {
    access(memory(), LOW);
    access(memory(), LOW + 0x5000 - size);
    access(memory(), 2 ** 40 + 4096 - size);
  });
  test(`${name} refuses what is unaligned, in a hole, at the edges, or no address`, () => {
    const m = memory();
    const hostile = [LOW + 1, LOW + size - 1, LOW + 0x1fff, LOW - size, LOW + 0x3000, LOW + 0x5000, 2 ** 64];
    for (const gpa of [...hostile, Number.NaN, -4]) assert.throws(() => access(m, gpa), NOT_RAM, `${gpa}`);
    assert.ok(m.regions.every((r) => r.bytes.every((b) => b === 0)));
  });
}

test("the word operations are little-endian, and return the value before", () => {
  const m = memory();
  m.write(LOW, Uint8Array.of(0x78, 0x56, 0x34, 0x92));
  assert.equal(m.load16(LOW), 0x5678);
  assert.equal(m.load32(LOW) >>> 0, 0x9234_5678);
  assert.equal(m.peek32(LOW) >>> 0, 0x9234_5678);
  assert.equal(m.or32(LOW, 0x8) >>> 0, 0x9234_5678);
  assert.equal(m.and32(LOW, 0x7fff_ffff) >>> 0, 0x9234_5678);
  assert.equal(m.compareExchange32(LOW, 0x1234_5678, 1), 0x1234_5678);
  assert.equal(m.compareExchange32(LOW, 7, 2), 1, "an unexpected value is returned");
  m.store16(LOW + 2, 0xffee);
  assert.equal(m.load32(LOW) >>> 0, 0xffee_0001, "and was not replaced");
});

test("hostAddress follows the region of each frame", () => {
  const m = memory();
  assert.equal(m.hostAddress(LOW + 0x2004), HOST_BASE + LOW + 0x2004);
  assert.equal(m.hostAddress(2 ** 40 + 1), HOST_BASE + 0x5000 + 2 ** 40 + 1);
  assert.throws(() => m.hostAddress(LOW + 0x3000), NOT_RAM);
});

test("size is that of all regions; find needs the whole range in one", () => {
  const m = memory();
  assert.equal(m.size, 5 * 4096);
  assert.equal(m.find(LOW + 0x1000, 0x1000)?.gpa, LOW);
  assert.equal(m.find(LOW + 0x1000, 0x1001), undefined);
});

const unmapped = (r: GuestRegion, change: Partial<GuestRegion>): GuestRegion => ({ ...r, ...change });
for (const [what, bad] of [
  ["a GPA within a frame", unmapped(ramRegion(0, 1), { gpa: 12 as Gpa })],
  ["a size that is not in whole frames", unmapped(ramRegion(0, 1), { size: 100 })],
  ["no size", unmapped(ramRegion(0, 1), { size: 0 })],
  ["a negative size", unmapped(ramRegion(0, 1), { size: -4096 })],
  [
    "bytes that begin within a frame",
    unmapped(ramRegion(0, 2), { size: 4096, bytes: new Uint8Array(new ArrayBuffer(8192), 8, 4096) }),
  ],
  ["an overlap with another", ramRegion(LOW + 0x1000, 1)],
  ["all of another inside it", ramRegion(0, 0x200)],
] as const)
  test(`a region with ${what} is refused, and the regions before stay`, () => {
    const m = memory();
    assert.throws(() => m.setRegions([...regions(), bad].reverse()), { code: "ERR_COIOMMU_PROTOCOL" });
    roundTrip(m, LOW, 0x3000);
  });

test("after setRegions, nothing of a region that is gone is reached", () => {
  const m = memory();
  m.load32(LOW); // the region that was used last is remembered
  m.setRegions([ramRegion(0, 1)]);
  assert.throws(() => m.load32(LOW), NOT_RAM);
  assert.equal(m.load32(0), 0);
});
