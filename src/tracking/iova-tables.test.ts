import assert from "node:assert/strict";
import test from "node:test";
import fc from "fast-check";
import { fails, holds } from "../../test/support/property.ts";
import { InvariantViolation } from "../base/errors.ts";
import type { Gfn } from "../base/units.ts";
import { SharedWords } from "../memory/shared-words.ts";
import { IOVA_PAGES, IovaTables, walk } from "./iova-tables.ts";
import type { Mapping } from "./mapping-trees.ts";

const POOL = 3;
const mapping = (first: number, last: number, gfn: number, flags = 3): Mapping => ({
  ...{ first, last, flags },
  gfn: gfn as Gfn,
});
/** What a device finds for a page. */
const entry = (gfn: number, flags = 3) => ((gfn << 2) | flags) >>> 0;

function rig(pages: number, quiesce = () => true, Tables = IovaTables) {
  const words = new SharedWords(new SharedArrayBuffer(4 * (POOL + pages * 1024)));
  const tables = new Tables(words, POOL, pages, quiesce);
  return { tables, at: (root: number, page: number) => walk(words, POOL, root, page) >>> 0 };
}

test("a mapping over the edges of tables of every level is found page by page, and not beside it", () => {
  for (const edge of [2 ** 10, 2 ** 20, 2 ** 30, IOVA_PAGES - 1027]) {
    const { tables, at } = rig(16);
    const root = tables.create()!;
    assert.equal(tables.map(root, mapping(edge - 3, edge + 1026, 7)), true);
    for (let i = 0; i < 1030; i++) assert.equal(at(root, edge - 3 + i), entry(7 + i));
    assert.deepEqual([at(root, edge - 4), at(root, edge + 1027)], [0, 0]);
    tables.unmap(root, { first: edge - 3, last: edge + 1026 });
    for (let i = 0; i < 1030; i++) assert.equal(at(root, edge - 3 + i), 0);
  }
});

test("flags and the largest frame number of all are in the entry", () => {
  const { tables, at } = rig(4);
  const root = tables.create()!;
  for (const flags of [0, 1, 2, 3]) tables.map(root, mapping(flags, flags, 2 ** 30 - 1, flags));
  for (const flags of [0, 1, 2, 3]) assert.equal(at(root, flags), entry(2 ** 30 - 1, flags));
});

test("what was never mapped cannot be unmapped, and no table is built for it", () => {
  const { tables, at } = rig(4);
  const root = tables.create()!;
  assert.throws(() => tables.unmap(root, { first: 5, last: 5 }), InvariantViolation);
  assert.equal(tables.map(root, mapping(2 ** 30, 2 ** 30, 7)), true, "all three tables are free still");
  assert.equal(at(root, 2 ** 30), entry(7));
});

test("pages beyond the address space lead nowhere", () => {
  const { tables, at } = rig(4);
  const root = tables.create()!;
  tables.map(root, mapping(0, 0, 1));
  for (const page of [IOVA_PAGES, 2 ** 50, 2 ** 52]) assert.equal(at(root, page), 0);
});

test("what does not fit is not mapped at all", () => {
  const { tables, at } = rig(5);
  const root = tables.create()!;
  assert.equal(tables.map(root, mapping(1000, 2100, 5)), false, "three leaves, and two tables above them");
  for (const page of [1000, 1023, 1024, 2047, 2048]) assert.equal(at(root, page), 0);
  assert.equal(tables.map(root, mapping(1000, 2047, 5)), true);
  assert.deepEqual([at(root, 1000), at(root, 2047)], [entry(5), entry(1052)]);
});

test("empty tables are taken back when room is needed, those of dead address spaces too", () => {
  const { tables, at } = rig(4);
  for (let i = 0; i < 20; i++) {
    const root = tables.create();
    assert.notEqual(root, undefined);
    for (const page of [0, 2 ** 20, 2 ** 30, IOVA_PAGES - 1]) {
      assert.equal(tables.map(root!, mapping(page, page, i)), true);
      assert.equal(at(root!, page), entry(i));
      tables.unmap(root!, { first: page, last: page });
    }
    tables.destroy(root!);
  }
});

test("tables that a device may still be in are not taken back, and are whole again", () => {
  let quiet = false;
  const { tables, at } = rig(4, () => quiet);
  const root = tables.create()!;
  tables.map(root, mapping(5, 5, 1));
  tables.unmap(root, { first: 5, last: 5 });
  assert.equal(tables.map(root, mapping(2 ** 30, 2 ** 30, 1)), false);
  assert.equal(tables.map(root, mapping(6, 6, 9)), true);
  assert.equal(at(root, 6), entry(9));
  tables.unmap(root, { first: 6, last: 6 });
  quiet = true;
  assert.equal(tables.map(root, mapping(2 ** 30, 2 ** 30, 1)), true);
  assert.deepEqual([at(root, 6), at(root, 2 ** 30)], [0, entry(1)]);
});

// --- two address spaces against a Map of pages ------------------------------------------------------------------------------

type Step = readonly [space: 0 | 1, first: number, count: number];
const step: fc.Arbitrary<Step> = fc.tuple(
  fc.constantFrom(0 as const, 1 as const),
  fc.tuple(fc.constantFrom(0, 2 ** 20, 2 ** 30), fc.constantFrom(0, 1, 1020, 2044)).map(([a, b]) => a + b),
  fc.constantFrom(1, 2, 5, 1030),
);

/** Each step maps a range, or unmaps what is mapped from its first page on. */
const isAMapOfPages = (Tables = IovaTables) =>
  fc.property(fc.array(step, { maxLength: 40, size: "max" }), (steps) => {
    const { tables, at } = rig(9, () => true, Tables);
    const spaces = [0, 1].map(() => ({ root: tables.create()!, maps: new Map<number, Mapping>() }));
    for (const [index, [which, first, count]] of steps.entries()) {
      const { root, maps } = spaces[which]!;
      const wanted = mapping(first, first + count - 1, 1 + 2000 * index, 1 + (index % 3));
      const known = maps.get(first);
      const meets = [...maps.values()].some((m) => m.first <= wanted.last && first <= m.last);
      if (known) {
        tables.unmap(root, known);
        maps.delete(first);
      } else if (!meets && tables.map(root, wanted)) maps.set(first, wanted);
      for (const { root, maps } of spaces)
        for (const base of [0, 2 ** 20, 2 ** 30])
          for (const offset of [0, 1, 2, 1019, 1020, 1023, 1024, 1030, 2043, 2044, 2048, 3073]) {
            const page = base + offset;
            const m = [...maps.values()].find((m) => m.first <= page && page <= m.last);
            assert.equal(at(root, page), m ? entry(m.gfn + page - m.first, m.flags) : 0, `page ${page}`);
          }
    }
  });

holds("devices find exactly what is mapped, however tight the room", isAMapOfPages(), 100);

class Keeps extends IovaTables {
  override unmap(root: number, { first, last }: Pick<Mapping, "first" | "last">): void {
    super.unmap(root, { first, last: Math.max(first, last - 1) });
  }
}
fails("an unmap that leaves the last page of a mapping", isAMapOfPages(Keeps), /page/);

class OneSpace extends IovaTables {
  #root: number | undefined;
  override create(): number | undefined {
    this.#root ??= super.create();
    return this.#root;
  }
}
fails("address spaces that share their table", isAMapOfPages(OneSpace), /page/);
