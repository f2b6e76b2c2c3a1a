import assert from "node:assert/strict";
import test from "node:test";
import { ramRegion } from "../../test/support/guest.ts";
import { active, type Machine, machine } from "../../test/support/machine.ts";
import type { Gfn } from "../base/units.ts";
import type { DmaAccess } from "../memory/guest-memory.ts";
import type { Mapping } from "./mapping-trees.ts";
import { DEVICES_MAX } from "./software-iommu.ts";

const [OK, IOERR, DEVERR, INVAL, RANGE, NOENT, NOMEM] = [0, 1, 3, 4, 5, 6, 8];
const mapping = (first: number, last: number, gfn: number, flags = 3): Mapping => ({
  ...{ first, last, flags },
  gfn: gfn as Gfn,
});
/** The frame that device 0 reaches at each page. */
const reach = (m: Machine, access: DmaAccess, ...pages: number[]) =>
  pages.map((page) => m.gate.translate(page, access));

/** Device 0 in domain 7, which maps pages 100 to 102 to frames 5 to 7, for reading and writing. */
function mapped(make = machine): Machine {
  const m = make();
  assert.equal(m.tracker.remapping.attach(0, 7, false), OK);
  assert.equal(m.tracker.remapping.map(7, mapping(100, 102, 5)), OK);
  return m;
}

test("an attached device reaches what its domain maps, at its addresses, and nothing at guest physical ones", () => {
  const m = mapped();
  assert.deepEqual(reach(m, "write", 99, 100, 101, 102, 103, 5), [-1, 5, 6, 7, -1, -1]);
  assert.equal(m.otherGate.translate(5, "write"), 5, "another device is in bypass");
  assert.equal(m.otherGate.translate(100, "write"), -1);
  assert.equal(m.tracker.remapping.unmap(7, 100, 102), OK);
  assert.deepEqual(reach(m, "read", 100, 101, 102), [-1, -1, -1]);
  assert.equal(m.otherGate.translate(5, "write"), -1, "and it is unpinned");
});

for (const [flags, read, write] of [
  [0, -1, -1],
  [1, 5, -1],
  [2, -1, 5],
  [3, 5, 5],
] as const)
  test(`a mapping with flags ${flags} is for ${read > 0 ? "" : "no "}reading and ${write > 0 ? "" : "no "}writing`, () => {
    const m = mapped();
    assert.equal(m.tracker.remapping.map(7, mapping(200, 200, 5, flags)), OK);
    assert.deepEqual([...reach(m, "read", 200), ...reach(m, "write", 200)], [read, write]);
  });

test("endpoints of one domain share its mappings; those of another do not see them", () => {
  const m = mapped();
  const { remapping } = m.tracker;
  assert.equal(remapping.attach(1, 8, false), OK);
  assert.equal(m.otherGate.translate(100, "read"), -1);
  assert.equal(remapping.attach(1, 7, false), OK);
  assert.equal(m.otherGate.translate(100, "read"), 5);
  assert.equal(remapping.map(8, mapping(1, 1, 1)), NOENT, "the other domain went with its last endpoint");
  assert.equal(remapping.detach(0, 7), OK);
  assert.equal(m.otherGate.translate(101, "read"), 6, "the domain stays with its last endpoint");
  assert.equal(remapping.detach(1, 7), OK);
  assert.deepEqual([m.tracker.pinned, remapping.mappings], [0, 0]);
});

test("statuses of ATTACH and DETACH", () => {
  const { remapping } = mapped().tracker;
  assert.equal(remapping.attach(0, 7, false), OK, "attached there already");
  assert.equal(remapping.attach(1, 7, true), INVAL, "not a bypass domain");
  assert.equal(remapping.attach(1, 9, true), OK);
  assert.equal(remapping.attach(2, 9, false), INVAL, "a bypass domain");
  assert.deepEqual([remapping.map(9, mapping(1, 1, 1)), remapping.unmap(9, 1, 1)], [INVAL, INVAL]);
  assert.equal(remapping.detach(0, 9), INVAL, "attached elsewhere");
  assert.equal(remapping.detach(2, 9), INVAL, "attached nowhere");
  assert.equal(remapping.detach(0, 8), INVAL, "no such domain");
});

test("a device in bypass domain or out of all domains reaches frames that are pinned; not with bypass off", () => {
  const m = mapped();
  const { remapping } = m.tracker;
  const other = (gfn: number) => m.otherGate.translate(gfn, "write");
  remapping.setBypass(false, [0, 1]);
  assert.deepEqual([other(5), ...reach(m, "read", 100)], [-1, 5]);
  assert.equal(remapping.attach(1, 9, true), OK);
  assert.deepEqual([other(5), other(8)], [5, -1]);
  assert.equal(remapping.detach(1, 9), OK);
  assert.equal(other(5), -1);
  remapping.setBypass(true, [0, 1]);
  assert.equal(other(5), 5);
  for (let endpoint = 2; endpoint < DEVICES_MAX; endpoint++)
    assert.equal(remapping.attach(endpoint, endpoint, false), OK);
});

test("an endpoint that is gone leaves its domain; the next one with its number is as bypass says", () => {
  const m = mapped();
  const { remapping } = m.tracker;
  assert.equal(remapping.attach(1, 7, false), OK);
  remapping.remove(0);
  assert.deepEqual(
    [...reach(m, "read", 100, 5), m.otherGate.translate(100, "write")],
    [-1, 5, 5],
    "5 is in bypass",
  );
  remapping.remove(1);
  assert.deepEqual([m.tracker.pinned, remapping.mappings, ...reach(m, "read", 5)], [0, 0, -1]);
  remapping.setBypass(false, []);
  remapping.add(0);
  assert.equal(remapping.attach(1, 9, true), OK);
  assert.equal(remapping.attach(1, 7, false), OK);
  assert.equal(remapping.map(7, mapping(1, 1, 6)), OK);
  assert.deepEqual(reach(m, "read", 6), [-1], "pinned, but bypass is off");
});

test("what firmware asks for is granted to a device in bypass only", () => {
  const m = machine({ beforeActivation: "bios" });
  assert.equal(m.tracker.remapping.attach(0, 7, false), OK);
  assert.equal(m.gate.request(1000 as Gfn), false);
  assert.equal(m.tracker.remapping.detach(0, 7), OK);
  assert.equal(m.gate.request(1000 as Gfn), true);
});

test("statuses of MAP and UNMAP; a MAP that is refused maps nothing, and pins nothing newly", () => {
  const m = mapped(() => machine({ quota: 4 }));
  const { remapping } = m.tracker;
  assert.equal(remapping.map(8, mapping(1, 1, 1)), NOENT);
  assert.equal(remapping.unmap(8, 1, 1), NOENT);
  assert.equal(remapping.map(7, mapping(102, 103, 20)), INVAL);
  assert.equal(remapping.map(7, mapping(103, 103, 4096)), RANGE);
  assert.equal(remapping.map(7, mapping(103, 104, 20)), NOMEM);
  Object.assign(m.pinner, { pagesMax: 3, errno: "ENODEV" });
  assert.equal(remapping.map(7, mapping(103, 103, 20)), IOERR);
  assert.deepEqual([m.tracker.pinned, remapping.mappings], [3, 1]);
  assert.deepEqual(reach(m, "read", 102, 103, 104), [7, -1, -1]);
  m.pinner.pagesMax = 4;
  assert.equal(remapping.map(7, mapping(103, 103, 20)), OK);
  assert.equal(remapping.unmap(7, 100, 101), RANGE);
  assert.deepEqual(reach(m, "read", 100, 103), [5, 20]);
  assert.equal(remapping.unmap(7, 0, 2 ** 40), OK);
  assert.deepEqual([m.tracker.pinned, remapping.mappings], [0, 0]);
});

test("MAP without room for its tables is NOMEM, and lets go of what it pinned", () => {
  const m = machine();
  const { remapping } = m.tracker;
  assert.equal(remapping.attach(0, 7, false), OK);
  let at = 0;
  let status = OK;
  for (; status === OK; at += 2 ** 20) status = remapping.map(7, mapping(at, at, (at / 2 ** 20) % 1000));
  assert.deepEqual([status, m.tracker.pinned], [NOMEM, Math.min(1000, remapping.mappings)]);
  const room = remapping.mappings;
  assert.equal(remapping.map(7, mapping(at + 1, at + 1, 1200)), NOMEM);
  assert.deepEqual([m.held(1200), remapping.mappings], [[false], room]);
  const attached = [1, 2, 3].map((endpoint) => remapping.attach(endpoint, endpoint, false));
  assert.deepEqual(attached.at(-1), NOMEM, "not even for a root");
  assert.equal(remapping.unmap(7, 0, 2 ** 40), OK);
  assert.equal(remapping.attach(3, 3, false), OK);
});

test("while a device keeps a DMA window open, UNMAP, DETACH and a change of domain are DEVERR and change nothing", () => {
  const m = mapped();
  const { remapping } = m.tracker;
  // A look at the clock is 5 ms: the wait for the window is over at once.
  m.clock.step = 5e6;
  m.otherGate.enter();
  assert.equal(remapping.unmap(7, 0, 2 ** 40), DEVERR);
  assert.equal(remapping.detach(0, 7), DEVERR);
  assert.equal(remapping.attach(0, 8, false), DEVERR);
  assert.equal(remapping.attach(0, 8, true), DEVERR);
  assert.deepEqual(reach(m, "write", 100, 101, 102, 5), [5, 6, 7, -1]);
  assert.deepEqual([m.held(), remapping.mappings, m.tracker.pinned], [[], 1, 3]);
  assert.equal(remapping.map(8, mapping(1, 1, 1)), NOENT);
  m.otherGate.leave();
  assert.equal(remapping.detach(0, 7), OK);
  assert.equal(m.tracker.pinned, 0);
});

test("a frame is out of reach before it is released, and pinned before it is reached", () => {
  const m = machine();
  const { remapping } = m.tracker;
  const seen: unknown[] = [];
  m.pinner.before = (what) => seen.push([what, ...reach(m, "read", 100)]);
  remapping.attach(0, 7, false);
  remapping.map(7, mapping(100, 100, 5));
  remapping.unmap(7, 100, 100);
  assert.deepEqual(seen, [
    ["pin", -1],
    ["release", -1],
  ]);
});

test("mappings of memory that leaves the map go with it; the others of their domain stay", () => {
  const m = mapped(() => machine({ regions: [ramRegion(0, 16), ramRegion(1536 * 4096, 16)] }));
  const { remapping } = m.tracker;
  assert.equal(remapping.map(7, mapping(200, 201, 1540)), OK);
  m.tracker.setMemory([ramRegion(0, 16)]);
  assert.deepEqual(reach(m, "read", 100, 200, 201), [5, -1, -1]);
  assert.deepEqual([remapping.mappings, m.tracker.pinned], [1, 3]);
  assert.equal(remapping.unmap(7, 0, 2 ** 40), OK);
  assert.equal(m.tracker.pinned, 0);
});

for (const [kept, pinned] of [
  [false, 0],
  [true, 3],
] as const)
  test(`a reset detaches all endpoints and ends all domains; their frames are ${kept ? "kept" : "released"}`, () => {
    const m = mapped(active);
    const { remapping } = m.tracker;
    assert.equal(remapping.attach(1, 9, true), OK);
    remapping.reset(kept);
    assert.deepEqual([m.tracker.pinned, remapping.mappings], [pinned, 0]);
    assert.deepEqual(reach(m, "read", 100, 5), [-1, kept ? 5 : -1]);
    assert.equal(remapping.map(7, mapping(1, 1, 1)), NOENT);
    assert.equal(remapping.detach(1, 9), INVAL);
    m.pass();
    m.pass();
    assert.equal(m.tracker.pinned, 0, "a table that claims nothing lets them go");
  });

test("a reset while a window is open: nothing is reached, and pins stay accounted until it closes", () => {
  const m = mapped();
  m.clock.step = 5e6;
  m.otherGate.enter();
  m.tracker.remapping.reset(false);
  assert.deepEqual([...reach(m, "read", 100, 5), m.tracker.pinned], [-1, -1, 3]);
  m.otherGate.leave();
  m.pass();
  assert.deepEqual([m.tracker.pinned, m.pinner.pages.size], [0, 0]);
});

test("a machine reset ends all domains", () => {
  const m = mapped();
  m.tracker.machineReset();
  assert.deepEqual([m.tracker.pinned, m.tracker.remapping.mappings, ...reach(m, "read", 100)], [0, 0, -1]);
});

test("with an IOMMU that is open, domains translate, also to frames that are not pinned any more", () => {
  const m = mapped();
  m.iommu.setOpen(true);
  assert.deepEqual(reach(m, "read", 100, 5, 900), [5, -1, -1]);
  assert.equal(m.tracker.remapping.detach(0, 7), OK);
  assert.deepEqual(reach(m, "read", 100, 900), [100, 900]);
});
