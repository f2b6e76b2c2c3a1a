import assert from "node:assert/strict";
import test from "node:test";
import { GuestTable, ram, ramRegion, store64 } from "../../test/support/guest.ts";
import type { Gfn, Gpa } from "../base/units.ts";
import { GuestMemory } from "../memory/guest-memory.ts";
import { TU_ACCESSED as A, TU_DIRTY as D, TU_PINNED as P, TU_WRITABLE as W } from "../wire/dtt.ts";
import { DmaTrackingTable, NO_UNIT, type Unit } from "./dtt.ts";

const ROOT = 0x10_0000;

/** RAM of 2 MiB, and the driver's and the host's view of a table in it. */
function tables(levels: number) {
  const memory = ram(512);
  const guest = new GuestTable(memory, ROOT, levels);
  return { memory, guest, host: new DmaTrackingTable(memory, ROOT as Gpa, levels) };
}

for (const [levels, gfns] of [
  [1, [0, 1, 1023]],
  [2, [0, 1023, 1024, 2 ** 19 - 1]],
  [3, [0, 2 ** 19, 2 ** 28 - 1]],
  [4, [0, 2 ** 28, 2 ** 32 + 5, 2 ** 37 - 1]],
  [5, [0, 2 ** 37, 2 ** 40 - 1]],
] as const)
  test(`a walk of ${levels} levels finds the unit of each frame, and another for each`, () => {
    const { guest, host, memory } = tables(levels);
    const units = gfns.map((gfn) => guest.unit(gfn));
    assert.equal(new Set(units).size, gfns.length);
    for (const [i, gfn] of gfns.entries()) {
      assert.equal(host.walk(gfn as Gfn), units[i]);
      assert.equal((units[i]! - ROOT) % 4096, 4 * (gfn % 1024));
      memory.or32(units[i]!, i + 1);
      assert.equal(host.load(units[i]!), i + 1);
    }
  });

for (const levels of [1, 2, 3, 4, 5])
  test(`a table of ${levels} levels has no unit for the first frame beyond its capacity`, () => {
    const { guest, host } = tables(levels);
    guest.unit(0);
    assert.equal(host.walk((2 ** (10 + 9 * (levels - 1))) as Gfn), NO_UNIT);
  });

for (const level of [2, 3, 4, 5])
  for (const [what, change] of [
    ["absent", () => 0n],
    ["not present", (entry: bigint) => entry & ~1n],
    ["with reserved bit 1", (entry: bigint) => entry | 2n],
    ["not aligned (bit 11)", (entry: bigint) => entry | (1n << 11n)],
    ["with reserved bit 52", (entry: bigint) => entry | (1n << 52n)],
    ["with reserved bit 63", (entry: bigint) => entry | (1n << 63n)],
    ["of a table outside RAM", () => (1n << 40n) | 1n],
    ["of the first page beyond RAM", () => (512n << 12n) | 1n],
    ["all ones", () => (1n << 64n) - 1n],
  ] as const)
    test(`an entry of level ${level} that is ${what}: no unit`, () => {
      const { guest, host, memory } = tables(5);
      guest.unit(7);
      const at = guest.entry(7, level);
      const raw = new Uint8Array(8);
      memory.read(at, raw);
      store64(memory, at, change(new DataView(raw.buffer).getBigUint64(0, true)));
      assert.equal(host.walk(7 as Gfn), NO_UNIT);
    });

test("an entry that refers to its own table, or to any page of RAM, gives some unit in RAM and no more", () => {
  const { host, memory } = tables(5);
  store64(memory, ROOT, BigInt(ROOT) | 1n);
  const unit = host.walk(7 as Gfn);
  assert.equal(unit, ROOT + 28);
  host.setPinned(unit);
  assert.equal(memory.load32(ROOT + 28) >>> 0, P);
});

test("a table that leaves the memory map has no units any more", () => {
  for (const levels of [1, 2, 5]) {
    const { guest, host, memory } = tables(levels);
    guest.unit(7);
    memory.setRegions([ramRegion(0, ROOT / 4096)]);
    assert.equal(host.walk(7 as Gfn), NO_UNIT);
  }
});

for (const [what, root, levels, valid] of [
  ["one level", ROOT, 1, true],
  ["five levels", ROOT, 5, true],
  ["the last frame of RAM", 511 * 4096, 3, true],
  ["no level", ROOT, 0, false],
  ["six levels", ROOT, 6, false],
  ["half a level", ROOT, 1.5, false],
  ["NaN levels", ROOT, Number.NaN, false],
  ["a root within a page", ROOT + 4, 2, false],
  ["a root beyond RAM", 512 * 4096, 2, false],
  ["a root of 2^63", 2 ** 63, 2, false],
] as const)
  test(`a driver ${valid ? "may" : "may not"} activate a table with ${what}`, () =>
    assert.equal(DmaTrackingTable.valid(new GuestMemory(ram(512).regions), root, levels), valid));

// --- units --------------------------------------------------------------------------------------------------------

/** Every value that matters: [word, outcome of claimForUnpin, word after it]. */
const claims: readonly (readonly [what: string, word: number, outcome: string, after: number])[] = [
  ["0", 0, "not-pinned", 0],
  ["P", P, "claimed", 0],
  ["P, D: D is carried", P + D, "claimed", D],
  ["P, A: A is cleared, P stays", P + A, "accessed", P],
  ["P, A, D", P + A + D, "accessed", P + D],
  ["P, COUNT 1", P + 1, "mapped", P + 1],
  ["P, COUNT 0x8000", P + 0x8000, "mapped", P + 0x8000],
  ["P, COUNT at its limit", P + 0xffff, "mapped", P + 0xffff],
  ["P, A, COUNT 1: A is cleared", P + A + 1, "mapped", P + 1],
  ["P, A, COUNT at its limit", P + A + 0xffff, "mapped", P + 0xffff],
  ["P, W, A, D, COUNT 3", P + W + A + D + 3, "mapped", P + W + D + 3],
  ["P, W without COUNT, which no driver does: kept", P + W, "accessed", P + W],
  ["P, lowest reserved bit: not exactly P", P + 0x1_0000, "accessed", P + 0x1_0000],
  ["P, highest reserved bit", P + 0x0800_0000, "accessed", P + 0x0800_0000],
  ["P, D, a reserved bit", P + D + 0x1_0000, "accessed", P + D + 0x1_0000],
  ["all ones", 2 ** 32 - 1, "mapped", 2 ** 32 - 1 - A],
  ["COUNT without P", 5, "mapped", 5],
  ["A without P: untouched", A, "not-pinned", A],
  ["all but P", P - 1, "mapped", P - 1],
];

function claimMistakes(open: (memory: GuestMemory) => DmaTrackingTable): string[] {
  return claims.flatMap(([what, word, outcome, after]) => {
    const memory = ram(512);
    const guest = new GuestTable(memory, ROOT, 1);
    guest.set(9, word);
    const got = open(memory).claimForUnpin(guest.unit(9));
    return got === outcome && guest.word(9) === after ? [] : [what];
  });
}
const open = (memory: GuestMemory) => new DmaTrackingTable(memory, ROOT as Gpa, 1);

test("claimForUnpin clears P exactly when COUNT, A, W and the reserved bits are 0, and ages A", () =>
  assert.deepEqual(claimMistakes(open), []));

test("broken twin: a claim that ignores COUNT is caught", () => {
  class Twin extends DmaTrackingTable {
    readonly #m: GuestMemory;
    constructor(memory: GuestMemory) {
      super(memory, ROOT as Gpa, 1);
      this.#m = memory;
    }
    override claimForUnpin(unit: Unit): ReturnType<DmaTrackingTable["claimForUnpin"]> {
      const before = this.#m.load32(unit) >>> 0;
      if (!(before & P) || before & A || !(before & 0xffff)) return super.claimForUnpin(unit);
      this.clearPinned(unit);
      return "claimed";
    }
  }
  assert.deepEqual(
    claimMistakes((memory) => new Twin(memory)),
    ["P, COUNT 1", "P, COUNT 0x8000", "P, COUNT at its limit"],
  );
});

test("a claim loses against a guest that maps between its load and its CAS", () => {
  class Racing extends GuestMemory {
    override compareExchange32(gpa: number, expected: number, replacement: number): number {
      super.or32(gpa, 1);
      return super.compareExchange32(gpa, expected, replacement);
    }
  }
  const memory = new Racing(ram(512).regions);
  const guest = new GuestTable(memory, ROOT, 1);
  guest.set(9, P);
  assert.equal(open(memory).claimForUnpin(guest.unit(9)), "mapped");
  assert.equal(guest.word(9), P + 1);
});

test("setPinned and clearPinned change P alone", () => {
  const { guest, host } = tables(1);
  for (const word of [0, A + 3, 2 ** 31 - 1]) {
    guest.set(9, word);
    host.setPinned(guest.unit(9));
    assert.equal(guest.word(9), P + word);
    host.clearPinned(guest.unit(9));
    assert.equal(guest.word(9), word);
  }
});

// --- dirty --------------------------------------------------------------------------------------------------------

/** Every value that matters: [word, whether it is dirty, word after it]. */
const dirt: readonly (readonly [word: number, dirty: boolean, after: number])[] = [
  [0, false, 0],
  [P, false, P],
  [P + A + 3, false, P + A + 3],
  [P + D, true, P],
  [P + A + W + D + 3, true, P + A + W + 3],
  [P + W + 1, true, P + W + 1],
  [D, true, 0],
  [2 ** 32 - 1, true, 2 ** 32 - 1 - D],
];
for (const [word, dirty, after] of dirt)
  test(`takeDirty of 0x${word.toString(16)}: ${dirty}, and D alone is cleared`, () => {
    const { guest, host } = tables(1);
    guest.set(9, word);
    assert.deepEqual([host.takeDirty(guest.unit(9)), guest.word(9)], [dirty, after]);
  });

/** A guest that maps between the host's load and its write. */
class Mapping extends GuestMemory {
  override and32(gpa: number, bits: number): number {
    super.add32(gpa, 1);
    return super.and32(gpa, bits);
  }
  override store32(gpa: number, value: number): void {
    super.add32(gpa, 1);
    super.store32(gpa, value);
  }
}

function countAfterDirty(open: (memory: GuestMemory) => DmaTrackingTable): number {
  const memory = new Mapping(ram(512).regions);
  const guest = new GuestTable(memory, ROOT, 1);
  guest.set(9, P + D + 1);
  open(memory).takeDirty(guest.unit(9));
  return guest.word(9) & 0xffff;
}

test("takeDirty loses no count of a guest that maps meanwhile", () => assert.equal(countAfterDirty(open), 2));

test("broken twin: a takeDirty by load and store loses it", () => {
  class Torn extends DmaTrackingTable {
    readonly #m: GuestMemory;
    constructor(memory: GuestMemory) {
      super(memory, ROOT as Gpa, 1);
      this.#m = memory;
    }
    override takeDirty(unit: Unit): boolean {
      const seen = this.#m.load32(unit);
      this.#m.store32(unit, seen & ~D);
      return (seen & (D | W)) !== 0;
    }
  }
  assert.equal(
    countAfterDirty((memory) => new Torn(memory)),
    1,
  );
});
