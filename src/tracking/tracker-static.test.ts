/** Guests that no driver tracks: everything is pinned in the background, and let go of when one comes after all. */
import assert from "node:assert/strict";
import test from "node:test";
import { ramRegion } from "../../test/support/guest.ts";
import { idle, type Machine, type MachineOptions, machine, RAM_FRAMES } from "../../test/support/machine.ts";
import { type Gfn, milliseconds } from "../base/units.ts";
import { TU_PINNED as P } from "../wire/dtt.ts";
import { VIRTIO_IOMMU_S_NOMEM as NOMEM, VIRTIO_IOMMU_S_OK as OK } from "../wire/virtio-iommu.ts";

const TIMEOUT = milliseconds(60_000);
/** Longer than a refused slice waits. */
const LATER = milliseconds(5_000);

/** A guest with an assigned function, which masters the bus unless told otherwise. */
function guest(options: MachineOptions = {}) {
  const bus = { mastering: true, quiet: false };
  const m = machine({
    ...{ beforeActivation: "bios", activationTimeout: TIMEOUT },
    bus: { mastering: () => bus.mastering, quiet: () => bus.quiet },
    ...options,
  });
  return { ...m, bus };
}

/** Do what is due by now. Returns the number of slices. */
function live(m: Machine): number {
  let slices = 0;
  while (m.tracker.dueAt <= m.clock.time && slices < 10_000) {
    m.tracker.live();
    slices++;
  }
  return slices;
}

/** Until no driver has come in time, and everything is pinned. */
function timedOut(options: MachineOptions = {}) {
  const m = guest(options);
  m.clock.time += TIMEOUT;
  live(m);
  assert.equal(m.tracker.life, "static");
  return m;
}

const progress = ({ counters: c }: Machine) => [c.backgroundPinned, c.backgroundFrames, c.backgroundStopped];

test("a guest that loads no driver in time is pinned as a whole, in slices, and says how far", () => {
  const m = guest();
  m.clock.time += TIMEOUT - milliseconds(1);
  assert.equal(live(m), 0);
  assert.deepEqual([m.tracker.life, m.tracker.pinned, progress(m)], ["undecided", 256, [0, 0, 0]]);
  m.clock.time += milliseconds(1);
  m.tracker.live();
  assert.equal(m.tracker.life, "static");
  m.tracker.live();
  m.tracker.live();
  const [pinned, frames] = progress(m);
  assert.ok(pinned! > 256 && pinned! < frames!, "a slice at a time");
  live(m);
  assert.deepEqual([m.tracker.pinned, progress(m)], [RAM_FRAMES, [RAM_FRAMES, RAM_FRAMES, 0]]);
  assert.deepEqual(m.held(0, 255, 256, RAM_FRAMES - 1), [true, true, true, true]);
  assert.equal(live(m), 0, "and then there is nothing to do");
});

test("without a function on the bus nothing happens, until there is one", () => {
  const m = guest();
  m.bus.mastering = false;
  m.clock.time += 10 * TIMEOUT;
  live(m);
  assert.equal(m.tracker.life, "undecided");
  m.bus.mastering = true;
  m.clock.time += LATER;
  live(m);
  assert.equal(m.tracker.pinned, RAM_FRAMES);
});

test("a driver in time: the guest is tracked for good", () => {
  const m = guest();
  m.activate();
  m.clock.time += 10 * TIMEOUT;
  assert.equal(live(m), 0);
  assert.equal(m.tracker.life, "tracked");
});

for (const beforeActivation of ["bios", "none"] as const)
  test(`${beforeActivation}: what a device touches while the rest is being pinned does not wait for its turn`, () => {
    const m = guest({ beforeActivation });
    m.clock.time += TIMEOUT;
    m.tracker.live();
    assert.equal(m.gate.request(2000 as Gfn), true);
    assert.deepEqual(m.held(2000, 1999), [true, false]);
    live(m);
    assert.equal(m.tracker.pinned, RAM_FRAMES, "and is pinned once");
    assert.equal(m.counters.framesPinned, RAM_FRAMES);
  });

test("a host that refuses is asked again later, and what it has pinned stays", () => {
  const m = guest();
  m.pinner.pagesMax = 1000;
  m.clock.time += TIMEOUT;
  m.tracker.live();
  assert.throws(() => live(m), { code: "ERR_COIOMMU_HOST", errno: "ENOMEM" });
  const stopped = m.tracker.pinned;
  assert.deepEqual([progress(m)[0], progress(m)[2], m.pinner.pages.size], [stopped, 2, stopped]);
  assert.ok(stopped > 256);
  assert.equal(live(m), 0, "not at once");
  m.clock.time += LATER;
  assert.throws(() => live(m), { code: "ERR_COIOMMU_HOST" });
  assert.equal(m.tracker.pinned, stopped);
  m.pinner.pagesMax = Number.POSITIVE_INFINITY;
  m.clock.time += LATER;
  live(m);
  assert.deepEqual([m.tracker.pinned, progress(m)[2]], [RAM_FRAMES, 0]);
});

test("regression: what the last slice was refused is pinned once, though the walk has begun anew", () => {
  const m = guest({ beforeActivation: "none", regions: [ramRegion(0, 100)] });
  m.pinner.pagesMax = 50;
  m.clock.time += TIMEOUT;
  assert.throws(() => live(m), { code: "ERR_COIOMMU_HOST" });
  m.pinner.pagesMax = Number.POSITIVE_INFINITY;
  m.clock.time += LATER;
  live(m);
  assert.deepEqual([m.tracker.pinned, m.pinner.pages.size], [100, 100]);
});

test("a quota below what the guest has: nothing is pinned for nothing, until it is raised", () => {
  const m = guest({ quota: 300 });
  m.clock.time += TIMEOUT;
  m.tracker.live();
  live(m);
  assert.deepEqual([m.tracker.life, m.tracker.pinned, progress(m)[2]], ["static", 256, 1]);
  assert.equal(m.gate.request(2000 as Gfn), true, "there is room for what devices touch");
  m.tracker.setQuota(RAM_FRAMES);
  live(m);
  assert.deepEqual([m.tracker.pinned, progress(m)[2]], [RAM_FRAMES, 0]);
});

test("a driver that comes late: what its table does not claim is let go of, what it maps is not", () => {
  const m = timedOut();
  m.activate();
  assert.deepEqual([m.tracker.life, progress(m)], ["tracked", [0, 0, 0]]);
  const before = m.pinner.pages.size;
  assert.equal(m.map(5, 1000), OK);
  assert.equal(m.pinner.pages.size, before, "it is pinned already");
  m.pass();
  assert.deepEqual([m.held(5, 1000, 1001), m.tracker.pinned], [[true, true, false], 2]);
  m.unmap(5, 1000);
  for (let i = 0; i < 2; i++) m.pass();
  assert.equal(m.tracker.pinned, 0);
  assert.equal(live(m), 0);
});

test("PIN on stops it half way", () => {
  const m = guest();
  m.clock.time += TIMEOUT;
  for (let i = 0; i < 3; i++) m.tracker.live();
  const pinned = m.tracker.pinned;
  m.activate();
  m.clock.time += LATER;
  assert.equal(live(m), 0);
  assert.equal(m.tracker.pinned, pinned);
  assert.equal(m.gate.request(2000 as Gfn), false);
  m.pass();
  assert.equal(m.tracker.pinned, 0);
});

test("PIN on without COMPLETE: everything stays pinned, because the table does not tell of all functions", () => {
  const m = timedOut();
  m.activate(false);
  assert.equal(m.tracker.life, "static");
  idle(m, 5);
  for (let i = 0; i < 3; i++) m.pass();
  assert.equal(m.tracker.unpinIdle({ first: 0, end: RAM_FRAMES, from: 0 }).unpinned, 0);
  assert.deepEqual([m.held(5), m.tracker.pinned], [[true], RAM_FRAMES]);
  m.activate(true);
  for (let i = 0; i < 3; i++) m.pass();
  assert.equal(m.tracker.pinned, 0);
});

test("a forged P keeps nothing but its own frame, and releases nothing that is mapped", () => {
  const m = timedOut();
  m.activate();
  assert.equal(m.map(6), OK);
  m.table.set(7, P);
  m.table.set(6, P);
  for (let i = 0; i < 3; i++) m.pass();
  assert.deepEqual([m.tracker.pinned, m.pinner.pages.size], [0, 0]);
});

test("a guest that turns PIN on and off all the time has never more pinned than its quota, and only RAM", () => {
  const m = guest({ quota: RAM_FRAMES - 1 });
  const ram = new Set([...m.memory.frames()].map((gfn) => m.memory.hostAddress(gfn * 4096)));
  m.pinner.before = () => assert.ok(m.pinner.pages.size <= RAM_FRAMES - 1);
  for (let i = 0; i < 20; i++) {
    m.clock.time += TIMEOUT;
    live(m);
    m.activate(i % 3 > 0);
    m.tracker.pin([{ gfn: (37 * i) % 1500, nrFrames: 400 }]);
    if (i % 2) m.pass();
    m.tracker.deactivate(i % 4 ? "pin-off" : "device-reset");
    if (i % 5 === 0) m.tracker.machineReset();
    assert.ok(m.tracker.pinned <= RAM_FRAMES - 1);
    assert.ok([...m.pinner.pages.values()].every((address) => ram.has(address)));
  }
  assert.equal(m.counters.framesPinned - m.counters.framesUnpinned, m.pinner.pages.size);
});

test("the quota is the same for a table that takes over", () => {
  const m = timedOut({ regions: [ramRegion(0, 2000)] });
  m.tracker.setQuota(1900);
  m.activate(false);
  assert.equal(m.tracker.pin([{ gfn: 5, nrFrames: 1 }]), OK, "pinned already");
  m.tracker.setMemory([...m.memory.regions, ramRegion(2000 * 4096, 16)]);
  live(m);
  assert.equal(m.tracker.pin([{ gfn: 2000, nrFrames: 1 }]), NOMEM);
});

test("RAM that comes later is pinned too, and what leaves is let go of", () => {
  const m = timedOut();
  const low = m.memory.regions;
  const high = ramRegion(0x100_0000, 64);
  m.tracker.setMemory([...low, high]);
  live(m);
  assert.deepEqual([m.held(4096, 4159), m.tracker.pinned], [[true, true], RAM_FRAMES + 64]);
  m.tracker.setMemory(low);
  assert.deepEqual([m.gate.allows(4096 as Gfn), m.pinner.pages.size, live(m)], [false, RAM_FRAMES, 0]);
});

test("a machine reset begins anew: the driver has the same time again", () => {
  const m = timedOut();
  m.tracker.machineReset();
  assert.deepEqual([m.tracker.life, m.tracker.pinned, progress(m)], ["undecided", 256, [0, 0, 0]]);
  m.clock.time += TIMEOUT - milliseconds(1);
  assert.equal(live(m), 0);
  m.clock.time += milliseconds(1);
  live(m);
  assert.equal(m.tracker.pinned, RAM_FRAMES);
});

test("all: everything from the start, and through a machine reset without letting go", () => {
  const m = guest({ beforeActivation: "all" });
  live(m);
  assert.deepEqual([m.tracker.life, m.tracker.pinned], ["static", RAM_FRAMES]);
  m.activate();
  idle(m, 5);
  m.pass();
  assert.equal(m.tracker.pinned, 1);
  m.tracker.machineReset();
  assert.deepEqual([m.tracker.life, m.held(5), m.gate.request(6 as Gfn)], ["static", [true], true]);
  live(m);
  const pinned = m.counters.framesPinned;
  m.tracker.machineReset();
  assert.deepEqual([live(m), m.tracker.pinned, m.counters.framesPinned], [0, RAM_FRAMES, pinned]);
});

test("a domain that lets go in a static guest leaves no hole", () => {
  const m = guest();
  m.clock.time += TIMEOUT;
  m.tracker.live();
  const mapping = { first: 1, last: 1, gfn: 2000, flags: 3 } as never;
  assert.equal(m.tracker.hold(mapping), OK);
  m.tracker.letGo([mapping]);
  assert.deepEqual(m.held(2000), [true]);
  live(m);
  assert.equal(m.tracker.pinned, RAM_FRAMES);
});

test("a harvest gives all of a static guest, and what a late driver lets go of once more", () => {
  const m = timedOut();
  m.tracker.dirty.start();
  const harvest = () => {
    let frames = 0;
    for (let more = true; more; ) {
      const slice = m.tracker.dirty.harvest();
      for (let i = 1; i < slice.ranges.length; i += 2) frames += slice.ranges[i]!;
      more = slice.more;
    }
    return frames;
  };
  assert.deepEqual([harvest(), harvest()], [RAM_FRAMES, RAM_FRAMES]);
  m.activate(true, true);
  m.pass();
  assert.deepEqual([harvest(), harvest()], [RAM_FRAMES, 0]);
});

// --- frozen -------------------------------------------------------------------------------------------------------

test("frozen, and all functions reset: what was pinned goes, and devices are granted what they touch", () => {
  const m = guest();
  m.activate();
  assert.equal(m.map(1000), OK);
  m.tracker.deactivate("pin-off");
  m.clock.time += LATER;
  live(m);
  assert.deepEqual([m.tracker.life, m.held(1000), m.gate.request(1001 as Gfn)], ["frozen", [true], false]);
  m.bus.quiet = true;
  m.bus.mastering = false;
  m.clock.time += LATER;
  live(m);
  assert.deepEqual([m.tracker.life, m.held(1000, 5), m.tracker.pinned], ["undecided", [false, true], 256]);
  assert.equal(m.gate.request(1001 as Gfn), true);
});

test("a driver that goes when all functions are reset leaves an undecided guest at once", () => {
  const m = guest();
  m.activate();
  assert.equal(m.map(1000), OK);
  m.bus.quiet = true;
  m.tracker.deactivate("device-reset");
  assert.deepEqual([m.tracker.life, m.held(1000)], ["undecided", [false]]);
});

test("a host that cannot pin firmware's window then is no failure of who turned PIN off", () => {
  const m = guest();
  m.activate();
  m.pass();
  m.bus.quiet = true;
  m.pinner.pagesMax = 3;
  m.tracker.deactivate("device-reset");
  assert.deepEqual([m.tracker.life, m.tracker.pinned, m.gate.request(5 as Gfn)], ["undecided", 0, true]);
});

test("frozen, and all functions reset: what a domain maps stays", () => {
  const m = guest({ beforeActivation: "none" });
  m.activate();
  assert.equal(m.tracker.hold({ first: 1, last: 1, gfn: 2000, flags: 3 } as never), OK);
  m.bus.quiet = true;
  m.tracker.deactivate("pin-off");
  assert.deepEqual([m.tracker.life, m.held(2000)], ["undecided", [true]]);
});
