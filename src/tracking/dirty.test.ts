import assert from "node:assert/strict";
import test from "node:test";
import { ramRegion } from "../../test/support/guest.ts";
import { active, idle, type Machine, type MachineOptions, machine } from "../../test/support/machine.ts";
import type { Gfn } from "../base/units.ts";
import { TU_DIRTY as D, TU_PINNED as P, TU_WRITABLE as W } from "../wire/dtt.ts";
import { VIRTIO_IOMMU_S_OK as OK } from "../wire/virtio-iommu.ts";
import type { DirtySlice } from "./dirty.ts";

const framesOf = ({ ranges }: DirtySlice): number[] => {
  const frames: number[] = [];
  for (let i = 0; i < ranges.length; i += 2)
    for (let j = 0; j < ranges[i + 1]!; j++) frames.push(ranges[i]! + j);
  return frames;
};

/** A whole harvest, in slices of 2 frames. */
function harvest(m: Machine): number[] {
  const frames: number[] = [];
  for (let more = true; more; ) {
    const slice = m.tracker.dirty.harvest(2);
    frames.push(...framesOf(slice));
    more = slice.more;
  }
  return frames.sort((a, b) => a - b);
}

/** A guest whose driver maintains D and W, with dirty tracking on. */
function tracking(options: MachineOptions = {}): Machine {
  const m = machine(options);
  m.activate(true, true);
  m.tracker.dirty.start();
  return m;
}

/** Pinned and idle; D says whether a device has written. */
function pinned(m: Machine, words: Readonly<Record<number, number>>): void {
  for (const [gfn, word] of Object.entries(words)) {
    idle(m, Number(gfn));
    m.table.set(Number(gfn), P + word);
  }
}

test("a harvest gives what has D, which it clears, and what has W, which stays", () => {
  const m = tracking();
  pinned(m, { 5: 0, 6: D, 7: W + 1, 8: D + W + 2, 9: D + 1 });
  assert.deepEqual(harvest(m), [6, 7, 8, 9]);
  assert.deepEqual(
    [5, 6, 7, 8, 9].map((gfn) => m.table.word(gfn) - P),
    [0, 0, W + 1, W + 2, 1],
  );
  assert.deepEqual(harvest(m), [7, 8]);
});

test("what a domain maps is given each time, and once more when it lets go, whether the table has it or not", () => {
  const m = tracking();
  pinned(m, { 6: 0 });
  const mapping = { first: 77, last: 78, gfn: 5 as Gfn, flags: 3 };
  assert.equal(m.tracker.hold(mapping), OK);
  for (let i = 0; i < 2; i++) assert.deepEqual(harvest(m), [5, 6]);
  m.tracker.letGo([mapping]);
  assert.deepEqual(m.held(5, 6), [false, true]);
  assert.deepEqual(harvest(m), [5, 6]);
  assert.deepEqual(harvest(m), []);
});

test("neighbours are one range, whatever the order in which they were pinned", () => {
  const m = tracking();
  pinned(m, { 9: D, 7: D, 8: D, 20: D });
  const { ranges, more } = m.tracker.dirty.harvest();
  assert.deepEqual([[...ranges], more], [[7, 3, 20, 1], false]);
});

test("a frame that was unpinned since the last harvest is given once more if it had D", () => {
  const m = tracking();
  pinned(m, { 5: 0, 6: D });
  m.pass();
  assert.deepEqual([m.held(5, 6), m.table.word(6)], [[false, false], 0]);
  assert.deepEqual([harvest(m), harvest(m)], [[6], []]);
});

test("a frame that was unpinned dirty and pinned again is given", () => {
  const m = tracking();
  pinned(m, { 6: D });
  m.pass();
  assert.equal(m.map(6), OK);
  assert.deepEqual([harvest(m), harvest(m)], [[6], []]);
});

test("an unpin that the host refuses loses no D", () => {
  const m = tracking();
  pinned(m, { 6: D });
  m.pinner.releasesMax = 0;
  m.pass();
  assert.deepEqual([m.table.word(6), harvest(m)], [P, [6]]);
});

test("what moves while a harvest is under way is in it", () => {
  const m = tracking();
  pinned(m, { 5: D, 6: D, 7: D, 8: D });
  const first = framesOf(m.tracker.dirty.harvest(1));
  m.pass();
  assert.equal(m.map(8), OK);
  assert.deepEqual([...first, ...harvest(m)].sort(), [5, 6, 7, 8]);
});

test("a harvest goes on in slices, and a request is served between them", () => {
  const m = tracking();
  const frames = Array.from({ length: 1500 }, (_, i) => i);
  idle(m, ...frames);
  for (const gfn of frames) m.table.set(gfn, P + D);
  const first = m.tracker.dirty.harvest();
  assert.equal(m.map(1510), OK);
  const second = m.tracker.dirty.harvest();
  assert.deepEqual([first.more, framesOf(first).length, second.more], [true, 1024, false]);
  assert.deepEqual([...framesOf(first), ...framesOf(second)], frames);
});

test("without start(), nothing is remembered, and D stays as it is", () => {
  const m = machine();
  m.activate(true, true);
  pinned(m, { 5: D, 6: D });
  m.map(6);
  m.pass();
  assert.equal(m.table.word(5), D);
  m.tracker.dirty.start();
  assert.deepEqual(harvest(m), [6]);
});

test("stop() forgets, and so does a second start()", () => {
  for (const forget of ["stop", "start"] as const) {
    const m = tracking();
    pinned(m, { 5: D });
    m.pass();
    m.tracker.dirty[forget]();
    m.tracker.dirty.start();
    assert.deepEqual(harvest(m), []);
  }
});

// --- frames of which no unit tells --------------------------------------------------------------------------------

test("without PIN_DIRTY every pinned frame is given each time, and once more when it is unpinned", () => {
  const m = active();
  m.tracker.dirty.start();
  idle(m, 5, 6);
  m.table.set(5, P);
  assert.deepEqual(
    [harvest(m), harvest(m)],
    [
      [5, 6],
      [5, 6],
    ],
  );
  m.pass();
  assert.deepEqual([harvest(m), harvest(m)], [[5, 6], [6]]);
});

test("what firmware's devices touch is given until the driver asks for it, and once then", () => {
  const m = machine({ beforeActivation: "bios", regions: [ramRegion(1024 * 4096, 1024)] });
  m.tracker.dirty.start();
  assert.ok(m.gate.request(1100 as Gfn));
  assert.deepEqual(harvest(m), [1100]);
  m.activate(true, true);
  assert.deepEqual(harvest(m), [1100]);
  assert.equal(m.map(1100), OK);
  assert.deepEqual([harvest(m), harvest(m)], [[1100], []]);
});

test("frozen: every pinned frame is given each time, whatever the old table says", () => {
  const m = tracking();
  pinned(m, { 5: 0 });
  m.tracker.deactivate("device-reset");
  assert.deepEqual([harvest(m), harvest(m)], [[5], [5]]);
});

test("a new activation: frames of the one before are given until they are claimed or unpinned, and once then", () => {
  const m = tracking();
  pinned(m, { 5: 0, 6: 0 });
  m.tracker.deactivate("pin-off");
  for (const gfn of [5, 6]) m.table.set(gfn, 0);
  m.activate(true, true);
  assert.deepEqual(harvest(m), [5, 6]);
  assert.equal(m.map(5), OK);
  m.pass();
  assert.deepEqual([m.held(5, 6), harvest(m), harvest(m)], [[true, false], [5, 6], []]);
});

test("a backend that takes over pins gives all of them", () => {
  const dead = tracking();
  pinned(dead, { 5: 0, 6: 0 });
  const m = machine();
  m.pinner.inherit(dead.pinner);
  m.tracker.dirty.start();
  m.tracker.adopt(
    [...dead.pinner.handles()].map(([address, handle]) => [
      ((address - dead.memory.hostAddress(0)) / 4096) as Gfn,
      handle,
    ]),
  );
  assert.deepEqual(harvest(m), [5, 6]);
});

test("a machine reset gives what was pinned once more", () => {
  const m = tracking();
  pinned(m, { 5: 0, 6: W + 1 });
  m.tracker.machineReset();
  assert.deepEqual([harvest(m), harvest(m)], [[5, 6], []]);
});

test("frames that are no longer RAM are forgotten", () => {
  const second = ramRegion(1024 * 4096, 1024);
  const m = tracking({ regions: [ramRegion(0, 1024), second] });
  pinned(m, { 5: D, 1030: D });
  m.map(6, 1031);
  m.pass();
  // The table lies in it.
  m.tracker.setMemory([second]);
  assert.deepEqual(harvest(m), [1030]);
});

test("everything is pinned: all RAM is given each time", () => {
  const m = machine({ beforeActivation: "all", wholeRam: true });
  m.tracker.dirty.start();
  assert.deepEqual([harvest(m).length, harvest(m).length], [2048, 2048]);
});
