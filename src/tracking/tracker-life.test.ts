import assert from "node:assert/strict";
import test from "node:test";
import { HOST_BASE, ramRegion } from "../../test/support/guest.ts";
import { active, idle, machine, RAM_FRAMES } from "../../test/support/machine.ts";
import type { Gfn } from "../base/units.ts";
import { TU_ACCESSED as A, TU_PINNED as P } from "../wire/dtt.ts";
import { VIRTIO_IOMMU_S_OK as OK, VIRTIO_IOMMU_S_UNSUPP as UNSUPP } from "../wire/virtio-iommu.ts";

// --- life -----------------------------------------------------------------------------------------------------------------

test("without an active table a request is refused with UNSUPP", () => {
  const m = machine();
  assert.equal(m.tracker.pin([{ gfn: 5, nrFrames: 1 }]), UNSUPP);
  m.activate();
  m.tracker.deactivate("pin-off");
  assert.equal(m.tracker.pin([{ gfn: 5, nrFrames: 1 }]), UNSUPP);
});

for (const event of ["pin-off", "device-reset"] as const)
  test(`${event} freezes: nothing is unpinned, P or not, until PIN is on again`, () => {
    const m = active();
    idle(m, 5);
    m.pass();
    m.tracker.startPass();
    m.tracker.deactivate(event);
    assert.equal(m.tracker.life, "frozen");
    assert.equal(m.tracker.slice(), false);
    for (let i = 0; i < 3; i++) m.pass();
    assert.deepEqual(m.held(5), [true]);
    m.tracker.activate(m.table.root, 2, true);
    m.pass();
    assert.deepEqual(m.held(5), [false]);
  });

test("a frame that was mapped before PIN was turned on stays until its driver has asked for it anew", () => {
  const m = active();
  m.map(5);
  m.tracker.deactivate("device-reset");
  m.table.set(5, 1); // ADR 4: P in the table means nothing any more, so the driver clears it
  m.activate();
  for (let i = 0; i < 3; i++) m.pass();
  assert.deepEqual(m.held(5), [true], "mapped, though without P");
  m.unmap(5);
  m.pass();
  assert.deepEqual(m.held(5), [false]);
});

test("a backend that starts in place of one that died keeps the pins, and unpins them when they are idle", () => {
  const dead = active();
  dead.map(5);
  idle(dead, 6);
  const pins = [...dead.pinner.handles()].map(([address, handle]): [Gfn, number] => [
    ((address - HOST_BASE) / 4096) as Gfn,
    handle,
  ]);
  const m = machine();
  m.pinner.inherit(dead.pinner);
  m.tracker.adopt(pins);
  assert.deepEqual([m.tracker.life, m.tracker.pinned, ...m.held(5, 6)], ["frozen", 2, true, true]);
  m.table.set(5, 1);
  m.activate();
  m.pass();
  assert.deepEqual(m.held(5, 6), [true, false]);
});

test("frozen: devices are not granted what they touch", () => {
  const m = active({ beforeActivation: "bios" });
  m.tracker.deactivate("device-reset");
  assert.equal(m.gate.request(1000 as Gfn), false);
});

test("machine reset: everything is released, and the table is not written", () => {
  const m = active();
  idle(m, 5);
  m.map(6);
  m.tracker.machineReset();
  assert.deepEqual([m.tracker.life, m.tracker.pinned, m.tracker.active], ["undecided", 0, false]);
  assert.deepEqual([m.held(5, 6), m.table.word(5), m.table.word(6)], [[false, false], P + A, P + A + 1]);
  assert.equal(m.counters.framesNow, 0);
});

test("parks do not outlive the activation", () => {
  const m = active();
  m.tracker.park();
  m.tracker.deactivate("pin-off");
  m.activate();
  assert.equal(m.tracker.parked, false);
});

test("a driver takes its table up again: what is mapped stays pinned before it is asked for", () => {
  const m = active();
  assert.equal(m.map(5, 6), OK);
  m.unmap(6);
  m.tracker.deactivate("device-reset");
  // ADR 4, point 11: the driver clears P.
  m.table.set(5, A + 1);
  m.table.set(6, A);
  m.activate();
  for (let i = 0; i < 3; i++) m.pass();
  assert.deepEqual(m.held(5, 6), [true, false]);
  assert.equal(m.tracker.pin([{ gfn: 5, nrFrames: 1 }]), OK);
  m.unmap(5);
  for (let i = 0; i < 2; i++) m.pass();
  assert.deepEqual(m.held(5), [false]);
});

for (const complete of [true, false])
  test(`the next driver's table ${complete ? "with" : "without"} COMPLETE: what an earlier one left pinned ${complete ? "goes" : "stays"}`, () => {
    const m = active();
    m.map(5, 6);
    m.tracker.deactivate("device-reset");
    // A new kernel, with zeroed units of its own.
    for (const gfn of [5, 6]) m.table.set(gfn, 0);
    m.activate(complete);
    m.map(6);
    for (let i = 0; i < 3; i++) m.pass();
    assert.deepEqual(m.held(5, 6), [!complete, true]);
    m.unmap(6);
    for (let i = 0; i < 2; i++) m.pass();
    assert.deepEqual(m.held(6), [false], "what this table once claimed is unpinned in any case");
  });

test("without COMPLETE, a forged P does not release a frame that this table never claimed", () => {
  const m = machine({ beforeActivation: "bios" });
  m.activate(false);
  m.table.set(5, P); // in the firmware's window
  for (let i = 0; i < 3; i++) m.pass();
  assert.deepEqual(m.held(5), [true]);
});

// --- before activation ----------------------------------------------------------------------------------------------------

test("bios: the low 1 MiB is pinned, what devices touch is pinned at that moment, and both are counted apart", () => {
  const m = machine({ beforeActivation: "bios" });
  assert.deepEqual(m.held(0, 255, 256, 1000), [true, true, false, false]);
  assert.equal(m.gate.request(1000 as Gfn), true);
  assert.deepEqual(m.held(1000), [true]);
  assert.equal(m.gate.request((RAM_FRAMES + 5) as Gfn), false, "not RAM");
  assert.equal(m.counters.framesFirmware, 257);
});

test("bios: RAM that appears in the low 1 MiB later is pinned, around a hole", () => {
  const m = machine({ beforeActivation: "bios", regions: [ramRegion(0, 160), ramRegion(0xf_0000, 16)] });
  assert.deepEqual(m.held(159, 240, 255), [true, true, true]);
  assert.equal(m.tracker.pinned, 176);
});

test("bios, then COMPLETE: what firmware used is unpinned, except what the table claims", () => {
  const m = machine({ beforeActivation: "bios" });
  m.activate(true);
  m.map(7);
  m.pass();
  assert.deepEqual([m.held(7), m.tracker.pinned], [[true], 1]);
});

test("bios, then no COMPLETE: what firmware used stays", () => {
  const m = machine({ beforeActivation: "bios" });
  m.activate(false);
  m.pass();
  assert.equal(m.tracker.pinned, 256);
});

test("bios: once the driver is active, devices are not granted what they touch", () => {
  const m = active({ beforeActivation: "bios" });
  assert.equal(m.gate.request(1000 as Gfn), false);
  assert.deepEqual(m.held(1000), [false]);
  m.tracker.machineReset();
  assert.equal(m.gate.request(1000 as Gfn), true, "and are again after a machine reset");
  assert.deepEqual(m.held(0, 255, 1000), [true, true, true]);
});

test("bios: a host that cannot pin refuses a device's touch, and says so for the window", () => {
  const m = machine({ beforeActivation: "bios" });
  m.pinner.pagesMax = 256;
  assert.equal(m.gate.request(1000 as Gfn), false);
  m.tracker.machineReset();
  m.pinner.pagesMax = 10;
  assert.throws(() => m.tracker.machineReset(), { code: "ERR_COIOMMU_HOST" });
  assert.equal(m.counters.framesNow, m.tracker.pinned, "the counters are right all the same");
});

test("bios: what devices touch is bounded by the quota", () => {
  const m = machine({ beforeActivation: "bios", quota: 257 });
  assert.equal(m.gate.request(1000 as Gfn), true);
  assert.equal(m.gate.request(1001 as Gfn), false);
  assert.deepEqual([m.held(1000, 1001), m.tracker.pinned], [[true, false], 257]);
});

test("bios: the window itself is bounded by the quota, and by what a reset could not release", () => {
  const m = machine({ beforeActivation: "bios", quota: 300 });
  m.pinner.releasesMax = 0;
  m.tracker.machineReset();
  assert.ok(m.pinner.pages.size <= 300);
});

test("none: nothing is pinned and nothing is granted", () => {
  const m = machine({ beforeActivation: "none" });
  assert.deepEqual([m.tracker.pinned, m.gate.request(5 as Gfn)], [0, false]);
});

test("all, as a whole: everything is pinned at once without a request, through a machine reset", () => {
  const m = machine({ beforeActivation: "all", wholeRam: true });
  assert.deepEqual([m.tracker.life, m.tracker.pinned, m.pinner.pages.size], ["static", RAM_FRAMES, 0]);
  assert.equal(m.gate.allows(1000 as Gfn), true);
  m.tracker.machineReset();
  assert.deepEqual(
    [m.tracker.life, m.tracker.pinned, m.gate.allows(1000 as Gfn)],
    ["static", RAM_FRAMES, true],
  );
});

// --- memory map ---------------------------------------------------------------------------------------------------------------

/** Frames 5 and 4100 are mapped by the guest and pinned; 4100 is in `high`, frames 4096 to 4159. */
function twoRegions() {
  const low = ramRegion(0, RAM_FRAMES);
  const high = ramRegion(0x100_0000, 64);
  const m = machine({ regions: [low, high] });
  m.table.unit(4100);
  m.activate();
  assert.equal(m.map(5, 4100), OK);
  return { ...m, low, high };
}

test("a region that disappears releases its frames, and no others", () => {
  const m = twoRegions();
  m.tracker.setMemory([m.low]);
  assert.deepEqual([m.held(5, 4100), m.tracker.pinned], [[true, false], 1]);
  assert.equal(m.counters.framesNow, 1);
});

test("a region that is backed by other host memory releases its frames", () => {
  const m = twoRegions();
  m.tracker.setMemory([m.low, ramRegion(0x100_0000, 64, HOST_BASE + 2 ** 30)]);
  assert.deepEqual([m.gate.allows(4100 as Gfn), m.pinner.pages.size], [false, 1]);
});

test("the same memory in another arrangement of regions releases nothing", () => {
  const m = twoRegions();
  m.tracker.setMemory([m.high, ramRegion(0x200_0000, 8), { ...m.low }]);
  assert.deepEqual([m.held(5, 4100), m.counters.framesUnpinned], [[true, true], 0]);
});

test("P of a frame whose memory is gone is cleared, so that the guest asks when it comes back", () => {
  const m = twoRegions();
  m.tracker.setMemory([m.low]);
  m.tracker.setMemory([m.low, m.high]);
  assert.deepEqual(m.held(4100), [false]);
  assert.equal(m.table.word(4100) & P, 0);
  assert.equal(m.map(4100), OK);
  assert.deepEqual(m.held(4100), [true]);
});

test("a release that the host refused while the region went away does not stop the next change of the map", () => {
  const m = twoRegions();
  m.pinner.releasesMax = 0;
  m.tracker.setMemory([m.low]);
  m.pinner.releasesMax = Number.POSITIVE_INFINITY;
  assert.doesNotThrow(() => m.tracker.setMemory([ramRegion(0, RAM_FRAMES - 8)]));
});

test("a frame whose release was refused is not taken for pinned when other memory comes in its place", () => {
  const m = twoRegions();
  m.pinner.releasesMax = 0;
  m.tracker.setMemory([m.low]);
  m.pinner.releasesMax = Number.POSITIVE_INFINITY;
  const elsewhere = HOST_BASE + 2 ** 30;
  m.tracker.setMemory([m.low, ramRegion(0x100_0000, 64, elsewhere)]);
  assert.equal(m.tracker.pin([{ gfn: 4100, nrFrames: 1 }]), OK);
  assert.ok(m.pinner.isPinned(elsewhere + 4100 * 4096), "the page that backs the frame now is pinned");
});

for (const parked of [false, true])
  test(`a request that a pin of no frame stands in the way of is served once the host lets go${parked ? ", also while parked" : ""}`, () => {
    const low = ramRegion(0, RAM_FRAMES);
    const m = machine({ quota: 2, regions: [low, ramRegion(0x100_0000, 64)] });
    m.table.unit(4100);
    m.activate();
    assert.equal(m.map(5, 4100), OK);
    m.pinner.releasesMax = 0;
    m.tracker.setMemory([low]);
    assert.equal(m.tracker.pinned, 2);
    m.pinner.releasesMax = Number.POSITIVE_INFINITY;
    if (parked) m.tracker.park();
    assert.equal(m.map(6), OK);
    assert.deepEqual([m.held(5, 6), m.tracker.pinned], [[true, true], 2]);
  });
