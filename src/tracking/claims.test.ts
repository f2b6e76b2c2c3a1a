/** What a guest claims and does not use: frames that it has asked for, and that no device has reached since. */
import assert from "node:assert/strict";
import test from "node:test";
import { active, idle, type Machine, machine } from "../../test/support/machine.ts";
import { DmaFault } from "../base/errors.ts";
import { FRAME_SIZE, type Gfn } from "../base/units.ts";
import { GatedMemory } from "../memory/gated-memory.ts";
import type { Mapping } from "./mapping-trees.ts";
import { countUnused, createIommuBuffer, DeviceGate, SoftwareIommu } from "./software-iommu.ts";

const NOMEM = 8;
const mapping = (gfn: number, count = 1): Mapping => ({
  ...{ first: 77, last: 76 + count, flags: 3 },
  gfn: gfn as Gfn,
});

/** A device accesses whole frames. */
const access = (m: Machine, gfn: number, frames = 1): void =>
  new GatedMemory(m.memory, m.gate).read(gfn * FRAME_SIZE, new Uint8Array(frames * FRAME_SIZE));

test("a claimed frame is unused until a device reaches it, and is counted until it is unpinned", () => {
  const m = active();
  assert.equal(m.map(5, 6, 7, 100), 0);
  assert.deepEqual(m.claims(), [4, 4]);
  access(m, 6, 2);
  assert.deepEqual(m.claims(), [4, 2]);
  access(m, 6);
  assert.deepEqual(m.claims(), [4, 2]);
  m.unmap(5, 6);
  m.pass();
  m.pass();
  assert.deepEqual(
    [m.claims(), m.held(5, 6, 7, 100)],
    [
      [2, 1],
      [false, false, true, true],
    ],
  );
});

test("every access counts: a word of a ring, a read and a write, by each of the devices", () => {
  const m = active();
  assert.equal(m.map(10, 11, 12, 13), 0);
  const [one, other] = [m.gate, m.otherGate].map((gate) => new GatedMemory(m.memory, gate)) as [
    GatedMemory,
    GatedMemory,
  ];
  one.load16(10 * FRAME_SIZE);
  assert.deepEqual(m.claims(), [4, 3]);
  other.store16(11 * FRAME_SIZE, 1);
  other.write(12 * FRAME_SIZE + 7, new Uint8Array(1));
  one.transfer(13 * FRAME_SIZE, 8, () => {}, "write");
  assert.deepEqual(m.claims(), [4, 0]);
});

test("to ask whether a device may access a frame is no access", () => {
  const m = active();
  assert.equal(m.map(5), 0);
  assert.deepEqual([m.gate.allows(5), m.gate.allows(5, "read"), m.claims()], [true, true, [1, 1]]);
});

test("a frame that is unpinned and claimed again is unused again, whether it was used before or not", () => {
  const m = active();
  idle(m, 5, 6);
  access(m, 5);
  m.pass();
  m.pass();
  assert.deepEqual(m.claims(), [0, 0]);
  assert.equal(m.map(5, 6), 0);
  assert.deepEqual(m.claims(), [2, 2]);
});

test("an unpin that is taken back changes neither: the page has been pinned all the time", () => {
  const m = active();
  idle(m, 5, 6);
  access(m, 5);
  m.pinner.releasesMax = 0;
  m.pass();
  m.pass();
  assert.deepEqual(
    [m.held(5, 6), m.claims()],
    [
      [true, true],
      [2, 1],
    ],
  );
});

test("to ask again for what is pinned does not make it unused", () => {
  const m = active();
  assert.equal(m.map(5), 0);
  access(m, 5);
  assert.equal(m.tracker.pin([{ gfn: 5, nrFrames: 1 }]), 0);
  assert.deepEqual(m.claims(), [1, 0]);
});

test("what firmware or a fault had pinned is claimed when the guest asks for it, and is unused from then on", () => {
  const m = machine({ beforeActivation: "bios" });
  const before = m.tracker.pinned;
  m.activate();
  assert.deepEqual([before > 0, m.claims()], [true, [0, 0]], "nobody has asked for it");
  assert.equal(m.map(5), 0);
  m.iommu.setFaultCapable(0, true);
  access(m, 1000);
  assert.deepEqual(m.claims(), [1, 1]);
  assert.equal(m.map(1000), 0);
  assert.deepEqual(m.claims(), [2, 2]);
  access(m, 1000);
  access(m, 5);
  assert.deepEqual(m.claims(), [2, 0]);
});

test("what fault-capable devices touch is not claimed", () => {
  const m = active();
  m.iommu.setFaultCapable(0, true);
  access(m, 9);
  assert.deepEqual([m.tracker.pinned, m.claims()], [1, [0, 0]]);
});

test("a MAP claims as a PIN request does, from hold() to letGo()", () => {
  const m = active();
  assert.equal(m.tracker.hold(mapping(5, 3)), 0);
  assert.deepEqual(m.claims(), [3, 3]);
  access(m, 5);
  assert.equal(m.map(6), 0);
  assert.deepEqual(m.claims(), [3, 2]);
  m.tracker.letGo([mapping(5, 3)]);
  assert.deepEqual(
    [m.held(5, 6, 7), m.claims()],
    [
      [false, true, false],
      [1, 1],
    ],
  );
});

test("a frame of firmware's that a domain maps is claimed as long", () => {
  const m = machine({ beforeActivation: "bios" });
  assert.equal(m.tracker.hold(mapping(5)), 0);
  assert.deepEqual(m.claims(), [1, 1]);
  m.tracker.letGo([mapping(5)]);
  assert.deepEqual([m.held(5), m.claims()], [[true], [0, 0]]);
});

test("what is kept for want of a table is claimed no more; nor is what a new backend takes over", () => {
  const m = active();
  assert.equal(m.tracker.hold(mapping(5, 2)), 0);
  m.tracker.deactivate("device-reset");
  m.tracker.letGo([mapping(5, 2)], true);
  assert.deepEqual(
    [m.held(5, 6), m.claims()],
    [
      [true, true],
      [0, 0],
    ],
  );
  const other = machine();
  const [handle] = [new Int32Array(1)];
  other.pinner.pin(Float64Array.of(other.memory.hostAddress(9 * FRAME_SIZE)), 1, handle);
  other.iommu.allow(9 as Gfn, true);
  other.tracker.adopt([[9 as Gfn, handle[0]!]]);
  assert.deepEqual([other.held(9), other.claims()], [[true], [0, 0]]);
});

test("with everything pinned, a machine reset lets go of nothing, and nothing of it is claimed any more", () => {
  const m = machine({ beforeActivation: "all" });
  while (m.tracker.dueAt <= m.clock.now()) m.tracker.live();
  m.activate();
  assert.equal(m.map(5, 6), 0);
  access(m, 5);
  assert.deepEqual(m.claims(), [2, 1]);
  m.tracker.machineReset();
  assert.deepEqual(
    [m.held(5, 6), m.claims()],
    [
      [true, true],
      [0, 0],
    ],
  );
});

test("a machine reset leaves nothing claimed", () => {
  const m = active();
  assert.equal(m.map(5, 6), 0);
  m.tracker.machineReset();
  assert.deepEqual(m.claims(), [0, 0]);
});

test("at its quota a guest that never lets a device use anything gets NOMEM after an unpin, and all of it is seen", () => {
  const m = active({ quota: 8 });
  idle(m, 1, 2, 3);
  access(m, 1, 3);
  const refused = Array.from({ length: 20 }, (_, i) => m.map(100 + i)).filter((status) => status === NOMEM);
  // What was idle has made room before anything was refused.
  assert.deepEqual([refused.length, m.held(1, 2, 3)], [12, [false, false, false]]);
  assert.deepEqual([m.tracker.pinned, m.counters.framesPeak, m.claims()], [8, 8, [8, 8]]);
});

test("an access that is refused as a whole may count for the pages before, as an accessed flag does", () => {
  const m = active();
  assert.equal(m.map(5), 0);
  assert.throws(() => access(m, 5, 2), DmaFault);
  assert.deepEqual(m.claims(), [1, 0]);
});

test("frames are told apart across the ends of words, to the last one of the table", () => {
  const buffer = createIommuBuffer(4096);
  const iommu = new SoftwareIommu(buffer, { now: () => 0 as never });
  const gate = new DeviceGate(buffer, 0, () => {});
  const gfns = [0, 15, 16, 31, 32, 4095] as Gfn[];
  for (const gfn of gfns) iommu.allow(gfn, true);
  for (const [i, gfn] of gfns.entries()) {
    assert.equal(countUnused(buffer), gfns.length - i);
    assert.equal(gate.translate(gfn, "read"), gfn);
  }
  assert.equal(countUnused(buffer), 0);
  assert.deepEqual(
    gfns.map((gfn) => gate.allows(gfn)),
    gfns.map(() => true),
  );
});

test("what was revoked while it was unused is not counted, and not reached", () => {
  const buffer = createIommuBuffer(64);
  const iommu = new SoftwareIommu(buffer, { now: () => 0 as never });
  const gate = new DeviceGate(buffer, 0, () => {});
  iommu.allow(5 as Gfn, true);
  iommu.revoke(5 as Gfn);
  assert.deepEqual([countUnused(buffer), gate.translate(5, "read")], [0, -1]);
  iommu.allow(5 as Gfn);
  assert.equal(countUnused(buffer), 1, "taken back");
  iommu.revoke(5 as Gfn);
  iommu.allow(5 as Gfn, false);
  assert.equal(countUnused(buffer), 0);
});
