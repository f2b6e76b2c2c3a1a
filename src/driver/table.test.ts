import assert from "node:assert/strict";
import test from "node:test";
import { ramRegion } from "../../test/support/guest.ts";
import { FRAME_SIZE, type Gfn, type Gpa } from "../base/units.ts";
import { GuestMemory, type GuestRegion } from "../memory/guest-memory.ts";
import { DmaTrackingTable, NO_UNIT } from "../tracking/dtt.ts";
import { ENTRY_PRESENT } from "../wire/dtt.ts";
import { buildTable } from "./table.ts";

/** Frames from `first` on, at most `limit`. */
function allocator(first: number, limit = Number.POSITIVE_INFINITY) {
  const pages: number[] = [];
  return {
    pages,
    allocate(frames: number): Gpa | undefined {
      assert.equal(frames, 1);
      if (pages.length >= limit) return undefined;
      pages.push(first + pages.length);
      return (pages.at(-1)! * FRAME_SIZE) as Gpa;
    },
    free() {},
  };
}

const region = (gfn: number, frames: number): GuestRegion => ramRegion(gfn * FRAME_SIZE, frames);

for (const [what, regions, levels, pages] of [
  ["one leaf is all", [region(0, 1024)], 1, 1],
  ["a frame more needs a level more", [region(0, 1025)], 2, 3],
  ["regions that share a leaf", [region(0, 600), region(700, 100)], 1, 1],
  ["a hole of a leaf has none", [region(0, 1024), region(2048, 1)], 2, 3],
  ["regions that begin within a leaf", [region(0, 128), region(1536, 1024)], 2, 4],
  ["RAM above 4 GiB", [region(0, 512), region(2 ** 20, 2048)], 3, 6],
  ["RAM above 16 TiB", [region(0, 512), region(2 ** 33, 1024)], 4, 7],
  ["the last frame that a GPA reaches", [region(0, 512), region(2 ** 40 - 1, 1)], 5, 9],
] as const)
  test(`every frame of RAM has a unit of its own, and no page is wasted: ${what}`, () => {
    const memory = new GuestMemory(regions);
    const pool = allocator(100);
    const { root, levels: used } = buildTable(memory, pool);
    assert.deepEqual([used, pool.pages.length], [levels, pages]);
    const table = new DmaTrackingTable(memory, root, used);
    const units = new Set<number>();
    let frames = 0;
    for (const r of regions)
      for (let gfn = r.gpa / FRAME_SIZE; gfn < (r.gpa + r.size) / FRAME_SIZE; gfn++, frames++) {
        const unit = table.walk(gfn as Gfn);
        assert.ok(pool.pages.includes(Math.floor(unit / FRAME_SIZE)), `frame ${gfn}`);
        assert.equal(memory.load32(unit), 0);
        units.add(unit);
      }
    assert.equal(units.size, frames);
  });

test("a frame in a leaf of no region has no unit", () => {
  const memory = new GuestMemory([region(0, 1024), region(4096, 1)]);
  const { root, levels } = buildTable(memory, allocator(100));
  const table = new DmaTrackingTable(memory, root, levels);
  assert.deepEqual(
    [1023, 1024, 4095, 4096, 5119, 5120].map((gfn) => table.walk(gfn as Gfn) !== NO_UNIT),
    [true, false, false, true, true, false],
  );
});

test("an entry is published with its PRESENT half last", () => {
  const stores: [gpa: number, present: boolean][] = [];
  class Logged extends GuestMemory {
    override store32(gpa: number, value: number): void {
      stores.push([gpa, (value & ENTRY_PRESENT) !== 0]);
      super.store32(gpa, value);
    }
  }
  // Tables above 4 GiB, so that both halves matter.
  const memory = new Logged([region(2 ** 21, 2048)]);
  const { root, levels } = buildTable(memory, allocator(2 ** 21 + 100));
  assert.notEqual(new DmaTrackingTable(memory, root, levels).walk((2 ** 21) as Gfn), NO_UNIT);
  assert.equal(stores.length, 2 * 3);
  for (let i = 0; i < stores.length; i += 2)
    assert.deepEqual(stores[i + 1], [stores[i]![0] - 4, true], "the low half follows the high half");
});

for (const limit of [0, 1, 2])
  test(`a guest with room for ${limit} of 3 pages has no table`, () => {
    const memory = new GuestMemory([region(0, 1025)]);
    assert.throws(() => buildTable(memory, allocator(100, limit)), {
      code: "ERR_COIOMMU_DMA_MAP",
      reason: "no-memory",
    });
  });
