import assert from "node:assert/strict";
import test from "node:test";
import fc from "fast-check";
import { fails, holds } from "../../test/support/property.ts";
import type { Gfn } from "../base/units.ts";
import { type Domain, Domains, MAPPINGS_MAX } from "./domains.ts";
import type { Mapping } from "./mapping-trees.ts";

const [OK, INVAL, RANGE, NOMEM] = [0, 4, 5, 8];
const PAGES = 2 ** 52;
const mapping = (first: number, last: number, gfn = 0, flags = 3): Mapping => ({
  ...{ first, last, flags },
  gfn: gfn as Gfn,
});

function one(options?: number): { domains: Domains; domain: Domain } {
  const domains = new Domains(options);
  return { domains, domain: domains.attach(1, 7, false) };
}
/** What UNMAP of [first, last] does: the status, and what is mapped afterwards. */
function unmap(domains: Domains, domain: Domain, first: number, last: number): unknown[] {
  const found = domains.within(domain, first, last);
  if (typeof found === "number") return [found, ...ranges(domains, domain)];
  for (const m of found) domains.unmap(domain, m);
  return [OK, ...ranges(domains, domain)];
}
const ranges = (domains: Domains, domain: Domain) =>
  [...domains.mapped(domain)].map(({ first, last }) => [first, last]);

// --- endpoints ---------------------------------------------------------------------------------------------------------

test("a domain is made with its first endpoint, and ceases to exist with its last", () => {
  const { domains, domain } = one();
  assert.equal(domains.attach(2, 7, false), domain);
  assert.deepEqual([...domain.endpoints], [1, 2]);
  assert.equal(domains.map(domain, mapping(3, 4, 9)), OK);
  assert.deepEqual(domains.detach(1), []);
  assert.deepEqual([domains.of(1), domains.of(2), domains.domain(7)], [undefined, domain, domain]);
  assert.deepEqual(domains.detach(2), [mapping(3, 4, 9)]);
  assert.deepEqual([domains.domain(7), domains.mappings, [...domains.all]], [undefined, 0, []]);
  const again = domains.attach(1, 7, true);
  assert.deepEqual([again.bypass, ranges(domains, again)], [true, []]);
});

test("domains have mappings of their own", () => {
  const { domains, domain } = one();
  const other = domains.attach(2, 0xffff_ffff, false);
  assert.equal(domains.map(domain, mapping(0, 9)), OK);
  assert.equal(domains.map(other, mapping(5, 5, 77)), OK);
  assert.deepEqual(domains.find(domain, 5), mapping(0, 9));
  assert.deepEqual(domains.find(other, 5), mapping(5, 5, 77));
  assert.equal(domains.find(other, 4), undefined);
});

// --- the examples of VIRTIO 1.2 section 5.13.6.6 ---------------------------------------------------------------------

for (const [number, maps, [first, last], status, left] of [
  [1, [], [0, 4], OK, []],
  [2, [[0, 9]], [0, 9], OK, []],
  [
    3,
    [
      [0, 4],
      [5, 9],
    ],
    [0, 9],
    OK,
    [],
  ],
  [4, [[0, 9]], [0, 4], RANGE, [[0, 9]]],
  [
    5,
    [
      [0, 4],
      [5, 9],
    ],
    [0, 4],
    OK,
    [[5, 9]],
  ],
  [6, [[0, 4]], [0, 9], OK, []],
  [
    7,
    [
      [0, 4],
      [10, 14],
    ],
    [0, 14],
    OK,
    [],
  ],
] as const)
  for (const base of [0, 2 ** 31 - 5, 2 ** 32 - 5, PAGES - 15])
    test(`UNMAP, example (${number}) of the standard, from page ${base} on`, () => {
      const { domains, domain } = one();
      for (const [from, to] of maps) assert.equal(domains.map(domain, mapping(base + from, base + to)), OK);
      assert.deepEqual(unmap(domains, domain, base + first, base + last), [
        status,
        ...left.map(([from, to]) => [base + from, base + to]),
      ]);
    });

test("an UNMAP that would split one mapping removes none of the others", () => {
  const { domains, domain } = one();
  for (const [first, last] of [
    [0, 1],
    [2, 5],
    [8, 9],
  ] as const)
    assert.equal(domains.map(domain, mapping(first, last)), OK);
  for (const [first, last] of [
    [0, 4],
    [3, 9],
    [3, 4],
    [1, 9],
  ] as const)
    assert.deepEqual(unmap(domains, domain, first, last).slice(0, 2), [RANGE, [0, 1]]);
  assert.deepEqual(unmap(domains, domain, 2, 9), [OK, [0, 1]]);
});

// --- bounds ----------------------------------------------------------------------------------------------------------------

test("the last page of all can be mapped, found and unmapped", () => {
  const { domains, domain } = one();
  assert.equal(domains.map(domain, mapping(PAGES - 1, PAGES - 1, 5)), OK);
  assert.equal(domains.find(domain, PAGES - 2), undefined);
  assert.deepEqual(domains.find(domain, PAGES - 1), mapping(PAGES - 1, PAGES - 1, 5));
  assert.equal(domains.map(domain, mapping(0, PAGES - 1)), INVAL);
  assert.deepEqual(unmap(domains, domain, 0, PAGES - 1), [OK]);
});

test("more mappings than the bound are refused; room comes back with UNMAP and with the end of a domain", () => {
  const { domains, domain } = one(3);
  const other = domains.attach(2, 8, false);
  for (const page of [10, 20]) assert.equal(domains.map(domain, mapping(page, page)), OK);
  assert.equal(domains.map(other, mapping(30, 30)), OK);
  assert.equal(domains.map(domain, mapping(40, 40)), NOMEM);
  assert.equal(domains.map(domain, mapping(10, 10)), INVAL, "what cannot be is told first");
  assert.deepEqual(unmap(domains, domain, 10, 10), [OK, [20, 20]]);
  assert.equal(domains.map(domain, mapping(40, 40)), OK);
  domains.detach(2);
  assert.equal(domains.map(domain, mapping(50, 50)), OK);
});

test("as many mappings as there may be, in order and against it: all are found, and none is left", () => {
  for (const at of [(i: number) => 2 * i, (i: number) => 2 * (MAPPINGS_MAX - i)]) {
    const { domains, domain } = one();
    for (let i = 0; i < MAPPINGS_MAX; i++) assert.equal(domains.map(domain, mapping(at(i), at(i), i)), OK);
    assert.equal(domains.map(domain, mapping(2 ** 40, 2 ** 40)), NOMEM);
    for (let i = 0; i < MAPPINGS_MAX; i++) assert.equal(domains.find(domain, at(i))?.gfn, i);
    assert.deepEqual(unmap(domains, domain, 0, PAGES - 1), [OK]);
    assert.equal(domains.mappings, 0);
  }
});

// --- against a Map of pages --------------------------------------------------------------------------------------------------

type Step = readonly ["map" | "unmap" | "find", first: number, count: number];
/** Few pages, so that ranges meet; at both ends of the address space. */
const step: fc.Arbitrary<Step> = fc
  .tuple(fc.constantFrom("map", "unmap", "find"), fc.nat(39), fc.integer({ min: 1, max: 9 }), fc.boolean())
  .map(([what, at, count, high]) => [what, high ? PAGES - 50 + at : at, count] as Step);

/** `make` with its mappings, against a Map from each mapped page to the page where its mapping begins, and to its frame. */
const isAMapOfPages = (make: () => Domains) =>
  fc.property(fc.array(step, { maxLength: 60, size: "max" }), (steps) => {
    const domains = make();
    const domain = domains.attach(1, 1, false);
    const pages = new Map<number, { first: number; last: number; gfn: number }>();
    for (const [index, [what, first, count]] of steps.entries()) {
      const last = first + count - 1;
      const range = Array.from({ length: count }, (_, i) => first + i);
      if (what === "map") {
        const overlaps = range.some((page) => pages.has(page));
        const gfn = 1000 * index;
        assert.equal(domains.map(domain, mapping(first, last, gfn)), overlaps ? INVAL : OK, "status of MAP");
        if (!overlaps) for (const page of range) pages.set(page, { first, last, gfn });
      } else if (what === "unmap") {
        const met = range.flatMap((page) => pages.get(page) ?? []);
        const splits = met.some((m) => m.first < first || m.last > last);
        assert.equal(unmap(domains, domain, first, last)[0], splits ? RANGE : OK, "status of UNMAP");
        if (!splits) for (const page of range) pages.delete(page);
      }
      for (const page of range) assert.equal(domains.find(domain, page)?.gfn, pages.get(page)?.gfn, "found");
    }
    const left = [...pages].filter(([page, m]) => page === m.first).sort(([a], [b]) => a - b);
    assert.deepEqual(
      [...domains.mapped(domain)].map((m) => [m.first, m.last, m.gfn]),
      left.map(([, m]) => [m.first, m.last, m.gfn]),
      "mappings",
    );
    assert.equal(domains.mappings, left.length, "number of mappings");
  });

holds(
  "mappings are what a Map of pages says",
  isAMapOfPages(() => new Domains()),
  500,
);

class Splits extends Domains {
  override within(domain: Domain, first: number, last: number): Mapping[] {
    return [...this.mapped(domain, first)].filter((m) => m.first <= last);
  }
}
fails(
  "an UNMAP that takes whole mappings with a part of them",
  isAMapOfPages(() => new Splits()),
  /status of UNMAP/,
);

class FirstOnly extends Domains {
  override map(domain: Domain, m: Mapping): number {
    return super.find(domain, m.first) ? INVAL : super.map(domain, { ...m, last: m.first });
  }
}
fails(
  "a MAP that knows a range by its first page",
  isAMapOfPages(() => new FirstOnly()),
  /status|found/,
);

class Leaves extends Domains {
  override unmap(domain: Domain, m: Mapping): void {
    if (m.last - m.first < 8) super.unmap(domain, m);
  }
}
fails(
  "an UNMAP that leaves long mappings",
  isAMapOfPages(() => new Leaves()),
  /found|mappings/,
);
