/** The table walk and the unit's word against docs/abi.md sections 1 and 2, spelled out with 64-bit integers. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { ramRegion } from "../../test/support/guest.ts";
import { fails, holds } from "../../test/support/property.ts";
import type { Gfn, Gpa } from "../base/units.ts";
import { GuestMemory } from "../memory/guest-memory.ts";
import { DmaTrackingTable, NO_UNIT, type Unit } from "./dtt.ts";

// --- the walk -----------------------------------------------------------------------------------------------------

/** GFNs of RAM: at 0, with a hole, and above 4 GiB, where an entry's high half counts. */
const PAGES = [0, 1, 2, 5, 6, 2 ** 20, 2 ** 20 + 1].map(BigInt);
/** Indices that tables are filled at, and that walks take. */
const INDICES = [0, 1, 511];

const page = fc.constantFrom(...PAGES);
const link = page.map((gfn) => (gfn << 12n) | 1n);
const entry = fc.oneof(
  { weight: 12, arbitrary: link },
  { weight: 1, arbitrary: fc.constant(0n) },
  { weight: 1, arbitrary: link.map((e) => e & ~1n) },
  {
    weight: 2,
    arbitrary: fc.tuple(link, fc.integer({ min: 1, max: 11 })).map(([e, b]) => e | (1n << BigInt(b))),
  },
  {
    weight: 2,
    arbitrary: fc.tuple(link, fc.integer({ min: 52, max: 63 })).map(([e, b]) => e | (1n << BigInt(b))),
  },
  {
    weight: 1,
    arbitrary: fc.constantFrom(3n, 7n, 2n ** 20n + 2n, 2n ** 40n - 1n).map((gfn) => (gfn << 12n) | 1n),
  },
  { weight: 1, arbitrary: fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }) },
);
const contents = fc.array(fc.array(entry, { minLength: INDICES.length, maxLength: INDICES.length }), {
  minLength: PAGES.length,
  maxLength: PAGES.length,
});
/** A GFN by what it selects: an entry of each upper level, then a unit. */
const gfn = fc
  .tuple(fc.array(fc.constantFrom(...INDICES), { maxLength: 4 }), fc.constantFrom(0, 1, 1023))
  .map(([entries, unit]) => entries.reduce((low, index, i) => low + index * 2 ** (10 + 9 * i), unit) as Gfn);

/** abi.md section 1. */
function modelWalk(
  pages: Map<bigint, DataView>,
  root: bigint,
  levels: number,
  gfn: bigint,
): bigint | undefined {
  if (gfn >> BigInt(10 + 9 * (levels - 1))) return undefined;
  let table = pages.get(root >> 12n) && root;
  for (let level = levels; level >= 2 && table !== undefined; level--) {
    const index = Number((gfn >> BigInt(10 + 9 * (level - 2))) & 511n);
    const entry = pages.get(table >> 12n)!.getBigUint64(8 * index, true);
    const reserved = entry & 0xfff0_0000_0000_0ffen;
    const next = entry & 0x000f_ffff_ffff_f000n;
    table = entry & 1n && !reserved && pages.has(next >> 12n) ? next : undefined;
  }
  return table === undefined ? undefined : table + 4n * (gfn & 1023n);
}

type Open = (memory: GuestMemory, root: Gpa, levels: number) => DmaTrackingTable;

const walksAsTheAbiSays = (open: Open) =>
  fc.property(
    contents,
    page,
    fc.integer({ min: 1, max: 5 }),
    fc.array(gfn, { minLength: 1, maxLength: 20 }),
    (entries, root, levels, gfns) => {
      const memory = new GuestMemory([ramRegion(0, 3), ramRegion(5 * 4096, 2), ramRegion(2 ** 32, 2)]);
      const pages = new Map(
        PAGES.map((gfn) => {
          const { bytes, gpa } = memory.find(Number(gfn) * 4096, 4096)!;
          return [gfn, new DataView(bytes.buffer, Number(gfn) * 4096 - gpa, 4096)] as const;
        }),
      );
      PAGES.forEach((gfn, i) => {
        INDICES.forEach((index, j) => void pages.get(gfn)!.setBigUint64(8 * index, entries[i]![j]!, true));
      });
      const table = open(memory, Number(root << 12n) as Gpa, levels);
      for (const gfn of gfns) {
        const unit = table.walk(gfn);
        const expected = modelWalk(pages, root << 12n, levels, BigInt(gfn));
        assert.equal(unit, expected === undefined ? NO_UNIT : Number(expected), `walk to frame ${gfn}`);
        if (unit !== NO_UNIT) table.load(unit); // throws outside RAM
      }
    },
  );

const real: Open = (memory, root, levels) => new DmaTrackingTable(memory, root, levels);
holds("a hostile table gives the unit that the ABI names, in RAM, or none", walksAsTheAbiSays(real), 1000);

fails(
  "a walk that does not look at bits 52 to 63",
  walksAsTheAbiSays((memory, root, levels) => {
    class Credulous extends GuestMemory {
      override load32(gpa: number): number {
        return gpa % 8 ? super.load32(gpa) & 0x000f_ffff : super.load32(gpa);
      }
    }
    return real(new Credulous(memory.regions), root, levels);
  }),
  /walk to frame/,
);

fails(
  "a walk that does not look whether the leaf is RAM",
  walksAsTheAbiSays((memory, root, levels) => {
    class Credulous extends GuestMemory {
      override find(gpa: number, length: number) {
        return super.find(gpa, length) ?? (length === 4096 ? memory.regions[0] : undefined);
      }
    }
    return real(new Credulous(memory.regions), root, levels);
  }),
  /walk to frame/,
);

// --- the word -------------------------------------------------------------------------------------------------------

const [D, A, P] = [1 << 28, 1 << 30, 1 << 31].map((bit) => bit >>> 0) as [number, number, number];
const has = (word: number, bit: number) => (word & bit) !== 0;
const without = (word: number, bit: number) => (word & ~bit) >>> 0;

/** abi.md section 2, "Host unpin" and "Host ageing": the outcome, and the word after. */
function modelClaim(word: number): [outcome: string, word: number] {
  if (!has(word, P)) return [has(word, 0xffff) ? "mapped" : "not-pinned", word];
  if (word === P || word === P + D) return ["claimed", word - P];
  return [word & 0xffff ? "mapped" : "accessed", without(word, A)];
}

const word = fc.oneof(
  fc.integer({ min: 0, max: 2 ** 32 - 1 }),
  fc
    .tuple(fc.subarray([0, 16, 27, 28, 29, 30, 31]), fc.constantFrom(0, 1, 0xffff))
    .map(([bits, count]) => bits.reduce((sum, bit) => (sum | (1 << bit)) >>> 0, count)),
);
const operations = {
  setPinned: (table: DmaTrackingTable, unit: Unit) => void table.setPinned(unit),
  clearPinned: (table: DmaTrackingTable, unit: Unit) => void table.clearPinned(unit),
  claimForUnpin: (table: DmaTrackingTable, unit: Unit) => table.claimForUnpin(unit),
};
const operation = fc.constantFrom(...(Object.keys(operations) as (keyof typeof operations)[]));

const changesWordsAsTheAbiSays = (open: Open) =>
  fc.property(word, fc.array(operation, { maxLength: 8 }), (initial, names) => {
    const memory = new GuestMemory([ramRegion(0, 1)]);
    memory.store32(0, initial | 0);
    const table = open(memory, 0 as Gpa, 1);
    let expected = initial;
    for (const name of names) {
      const outcome = operations[name](table, 0 as Unit);
      let claim: string | undefined;
      if (name === "setPinned") expected = (expected | P) >>> 0;
      else if (name === "clearPinned") expected = without(expected, P);
      else [claim, expected] = modelClaim(expected);
      assert.equal(outcome, claim, "outcome");
      assert.equal(table.load(0 as Unit), expected, "word");
    }
  });

holds("a unit's word changes as the ABI says, whatever it holds", changesWordsAsTheAbiSays(real), 1000);

fails(
  "a claim of exactly P that loses D",
  changesWordsAsTheAbiSays(
    (memory, root, levels) =>
      new (class extends DmaTrackingTable {
        override claimForUnpin(unit: Unit) {
          const outcome = super.claimForUnpin(unit);
          if (outcome === "claimed") memory.and32(unit, ~D);
          return outcome;
        }
      })(memory, root, levels),
  ),
  /word/,
);
