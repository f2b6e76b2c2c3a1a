import assert from "node:assert/strict";
import test from "node:test";
import { ramRegion } from "../../test/support/guest.ts";
import { active, idle, type Machine, machine, RAM_FRAMES } from "../../test/support/machine.ts";
import type { Gfn } from "../base/units.ts";
import { TU_ACCESSED as A, TU_PINNED as P } from "../wire/dtt.ts";
import type { Mapping } from "./mapping-trees.ts";

const [OK, IOERR, RANGE, NOMEM] = [0, 1, 5, 8];
/** A mapping of frames [gfn, gfn + count), wherever it is in its domain. */
const frames = (gfn: number, count = 1): Mapping => ({
  ...{ first: 77, last: 76 + count, flags: 3 },
  gfn: gfn as Gfn,
});
const pin = (m: Machine, gfn: number) => m.tracker.pin([{ gfn, nrFrames: 1 }]);

test("frames that a domain maps are pinned without P, from hold() to letGo(), without any table", () => {
  const m = machine();
  assert.equal(m.tracker.hold(frames(5, 3)), OK);
  assert.deepEqual(m.held(4, 5, 6, 7, 8), [false, true, true, true, false]);
  assert.equal(m.table.word(5), 0);
  assert.deepEqual([m.counters.framesNow, m.counters.framesPinned], [3, 3]);
  m.tracker.letGo([frames(5, 3)]);
  assert.deepEqual(m.held(5, 6, 7), [false, false, false]);
  assert.deepEqual([m.counters.framesNow, m.counters.framesUnpinned, m.pinner.pages.size], [0, 3, 0]);
});

test("a frame that several mappings need goes with the last of them", () => {
  const m = machine();
  for (const mapping of [frames(5, 3), frames(7, 3)]) assert.equal(m.tracker.hold(mapping), OK);
  assert.equal(m.pinner.pages.size, 5, "a frame is pinned once");
  m.tracker.letGo([frames(5, 3)]);
  assert.deepEqual(m.held(5, 6, 7, 8, 9), [false, false, true, true, true]);
  m.tracker.letGo([frames(7, 3)]);
  assert.deepEqual(m.held(7, 8, 9), [false, false, false]);
});

test("a PIN request for a frame of a domain sets P without a second pin; the frame outlives the mapping", () => {
  const m = active();
  assert.equal(m.tracker.hold(frames(5)), OK);
  assert.equal(m.map(5), OK);
  assert.deepEqual([m.table.word(5), m.pinner.pages.size, m.counters.framesPinned], [P + A + 1, 1, 1]);
  m.tracker.letGo([frames(5)]);
  assert.deepEqual(m.held(5), [true]);
  m.unmap(5);
  m.pass();
  m.pass();
  assert.deepEqual([m.held(5), m.table.word(5)], [[false], 0]);
});

test("a frame that the table had pinned is not pinned again, and stays when the domain lets go of it", () => {
  const m = active();
  assert.equal(m.map(5), OK);
  assert.equal(m.tracker.hold(frames(5)), OK);
  m.tracker.letGo([frames(5)]);
  assert.deepEqual([m.held(5), m.table.word(5), m.pinner.pages.size], [[true], P + A + 1, 1]);
});

test("an unpin pass skips frames that a domain maps, idle or without P", () => {
  const m = active();
  idle(m, 5);
  for (const gfn of [5, 6]) assert.equal(m.tracker.hold(frames(gfn)), OK);
  for (let i = 0; i < 4; i++) m.pass();
  assert.deepEqual(m.held(5, 6), [true, true]);
  m.tracker.letGo([frames(5), frames(6)]);
  assert.deepEqual(m.held(5, 6), [true, false]);
  m.pass();
  m.pass();
  assert.deepEqual(m.held(5), [false]);
});

for (const [what, gfn, count] of [
  ["a frame beyond RAM", RAM_FRAMES, 1],
  ["a range that runs out of RAM", RAM_FRAMES - 1, 2],
  ["more frames than there are", 0, RAM_FRAMES + 1],
  ["2^52 frames", 0, 2 ** 52],
  ["a frame beyond 2^40", 2 ** 40, 1],
] as const)
  test(`hold() of ${what} is RANGE, and pins nothing`, () => {
    const m = machine();
    assert.equal(m.tracker.hold(frames(gfn, count)), RANGE);
    assert.equal(m.tracker.pinned, 0);
  });

for (const [errno, pagesMax] of [
  ["ENODEV", 2],
  ["ENOMEM", 0],
] as const)
  test(`hold() that the host refuses with ${errno} is IOERR, and leaves no frame newly pinned or needed`, () => {
    const m = machine();
    Object.assign(m.pinner, { pagesMax, errno });
    assert.equal(m.tracker.hold(frames(5, 3)), IOERR);
    assert.deepEqual([m.held(5, 6, 7), m.tracker.pinned], [[false, false, false], 0]);
    m.pinner.pagesMax = 3;
    assert.equal(m.tracker.hold(frames(5, 3)), OK);
    m.tracker.letGo([frames(5, 3)]);
    assert.equal(m.tracker.pinned, 0);
  });

test("hold() beyond the quota is NOMEM, also without a table; what is idle makes room for it", () => {
  assert.equal(machine({ quota: 2 }).tracker.hold(frames(5, 3)), NOMEM);
  const m = active({ quota: 3 });
  idle(m, 1, 2);
  assert.equal(m.tracker.hold(frames(5, 3)), OK);
  assert.deepEqual([m.held(1, 2, 5, 6, 7), m.tracker.pinned], [[false, false, true, true, true], 3]);
  assert.equal(pin(m, 1), NOMEM, "frames of domains make no room");
});

test("without a table, a quota that is tight loses no frame: they are unpinned once there is one", () => {
  const m = active({ quota: 2 });
  idle(m, 1);
  m.tracker.deactivate("pin-off");
  assert.equal(m.tracker.hold(frames(5, 2)), NOMEM);
  m.activate();
  m.pass();
  m.pass();
  assert.deepEqual(m.held(1), [false]);
});

test("what the host does not release stays accounted, and is tried again later, without any table", () => {
  const m = machine({ quota: 3 });
  const mappings = [frames(5), frames(7), frames(9)];
  for (const mapping of mappings) assert.equal(m.tracker.hold(mapping), OK);
  m.pinner.releasesMax = 1;
  m.tracker.letGo(mappings);
  assert.deepEqual([m.tracker.pinned, m.counters.framesNow, m.pinner.pages.size], [2, 2, 2]);
  for (const gfn of [5, 7, 9]) assert.equal(m.gate.allows(gfn as Gfn), false, "no device reaches it");
  assert.equal(m.tracker.hold(frames(10, 2)), NOMEM);
  m.pinner.releasesMax = Number.POSITIVE_INFINITY;
  m.pass();
  assert.deepEqual([m.tracker.pinned, m.counters.framesNow, m.pinner.pages.size], [0, 0, 0]);
});

test("frames that are kept go when a table says that nobody uses them", () => {
  const m = active();
  assert.equal(m.tracker.hold(frames(5, 2)), OK);
  m.tracker.deactivate("device-reset");
  m.tracker.letGo([frames(5, 2)], true);
  assert.deepEqual(m.held(5, 6), [true, true]);
  m.activate();
  m.pass();
  assert.deepEqual(m.held(5, 6), [false, false]);
});

test("with everything pinned as a whole, a domain pins and releases nothing", () => {
  const m = machine({ beforeActivation: "all", wholeRam: true });
  assert.equal(m.tracker.hold(frames(5)), OK);
  assert.equal(m.tracker.hold(frames(RAM_FRAMES)), RANGE);
  m.tracker.letGo([frames(5)]);
  assert.deepEqual([m.gate.allows(5 as Gfn), m.pinner.pages.size, m.tracker.pinned], [true, 0, RAM_FRAMES]);
});

test("memory that leaves the map takes its pins along, and a machine reset takes all", () => {
  const m = machine({ regions: [ramRegion(0, 16), ramRegion(1536 * 4096, 16)] });
  assert.equal(m.tracker.hold(frames(5, 2)), OK);
  assert.equal(m.tracker.hold(frames(1540)), OK);
  m.tracker.setMemory([ramRegion(0, 16)]);
  assert.deepEqual([m.gate.allows(1540 as Gfn), m.tracker.pinned], [false, 2]);
  m.tracker.machineReset();
  assert.equal(m.tracker.pinned, 0);
});
