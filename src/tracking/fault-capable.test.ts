import assert from "node:assert/strict";
import test from "node:test";
import { active, idle, type MachineOptions, machine, RAM_FRAMES } from "../../test/support/machine.ts";
import { DmaFault } from "../base/errors.ts";
import { FRAME_SIZE, type Gfn } from "../base/units.ts";
import { GatedMemory } from "../memory/gated-memory.ts";
import { VIRTIO_IOMMU_S_NOMEM, VIRTIO_IOMMU_S_OK } from "../wire/virtio-iommu.ts";

/** A machine whose device 0 is fault-capable; device 1 is not. */
function faulting(options: MachineOptions = {}, complete = true) {
  const m = active(options, complete);
  m.iommu.setFaultCapable(0, true);
  const memory = new GatedMemory(m.memory, m.gate);
  const page = new Uint8Array(FRAME_SIZE);
  return {
    ...m,
    /** The device reads `frames` frames from `gfn` on. */
    access(gfn: number, frames = 1): void {
      memory.read(gfn * FRAME_SIZE, frames === 1 ? page : new Uint8Array(frames * FRAME_SIZE));
    },
    pinned: () => [...m.tracker.frames()].sort((a, b) => a - b),
  };
}

test("what a fault-capable device touches is pinned, and gets no P", () => {
  const m = faulting();
  m.access(7, 3);
  assert.deepEqual(m.held(6, 7, 8, 9, 10), [false, true, true, true, false]);
  assert.equal(m.memory.load32(m.table.unit(7)), 0);
  assert.deepEqual([m.counters.framesFaulted, m.counters.framesPinned, m.counters.framesFirmware], [3, 3, 0]);
});

test("a device that is not fault-capable faults as ever, beside one that is", () => {
  const m = faulting();
  m.iommu.setFaultCapable(1, true);
  m.iommu.setFaultCapable(0, false);
  assert.throws(() => m.access(7), DmaFault);
  assert.deepEqual(m.pinned(), []);
});

test("a fault counts as an access: the first pass spares it, the second unpins it, and the device faults again", () => {
  const m = faulting();
  m.access(7);
  m.pass();
  assert.deepEqual(m.held(7), [true]);
  m.pass();
  assert.deepEqual(m.held(7), [false]);
  m.access(7);
  assert.deepEqual([m.held(7)[0], m.counters.framesFaulted], [true, 2]);
});

for (const complete of [true, false])
  test(`COMPLETE ${complete}: what was pinned by a fault goes, what is mapped stays`, () => {
    const m = faulting({}, complete);
    m.access(7, 2);
    assert.equal(m.map(8), VIRTIO_IOMMU_S_OK);
    for (let i = 0; i < 3; i++) m.pass();
    assert.deepEqual(m.held(7, 8), [false, true]);
    m.unmap(8);
    for (let i = 0; i < 2; i++) m.pass();
    assert.deepEqual(m.pinned(), []);
  });

test("a frame that is counted up without P, because its request is still to come, stays", () => {
  const m = faulting();
  m.access(7);
  assert.equal(m.table.map(7), false, "a driver that maps it has to ask");
  for (let i = 0; i < 3; i++) m.pass();
  assert.deepEqual(m.held(7), [true]);
});

test("what an access has asked for stays until it ends, whatever passes there are, and whose it is", () => {
  const m = faulting();
  idle(m, 9);
  assert.equal(m.gate.request(7 as Gfn), true);
  assert.equal(m.gate.request(9 as Gfn), true, "pinned by now, for somebody else");
  for (let i = 0; i < 4; i++) m.pass();
  assert.deepEqual(m.held(7, 9), [true, true]);
  m.gate.accessEnded();
  for (let i = 0; i < 2; i++) m.pass();
  assert.deepEqual(m.held(7, 9), [false, false]);
});

test("an access that needs more than the quota has room for faults, and evicts nothing of its own", () => {
  const m = faulting({ quota: 4 });
  assert.throws(() => m.access(7, 5), DmaFault);
  assert.equal(m.counters.framesFaulted, 4);
  m.access(20, 4);
  assert.deepEqual(m.pinned(), [20, 21, 22, 23]);
});

test("an access under way keeps the frame", () => {
  const m = faulting();
  m.access(7);
  m.pass();
  m.gate.enter();
  m.clock.step = 1e5;
  m.pass();
  assert.deepEqual(m.held(7), [true]);
  m.gate.leave();
  m.pass();
  assert.deepEqual(m.held(7), [false]);
});

test("a frame that a domain maps stays, and goes with the passes when the domain lets go of it", () => {
  const m = faulting();
  m.access(7);
  const mapping = { first: 100, last: 100, gfn: 7 as Gfn, flags: 3 };
  assert.equal(m.tracker.hold(mapping), VIRTIO_IOMMU_S_OK);
  for (let i = 0; i < 3; i++) m.pass();
  assert.deepEqual(m.held(7), [true]);
  m.tracker.letGo([mapping]);
  assert.deepEqual(m.held(7), [true], "no unit and no domain had pinned it");
  for (let i = 0; i < 2; i++) m.pass();
  assert.deepEqual(m.held(7), [false]);
});

test("attached to a domain, it reaches what the domain maps, and faults elsewhere", () => {
  const m = faulting();
  assert.equal(m.tracker.remapping.attach(0, 1, false), VIRTIO_IOMMU_S_OK);
  assert.throws(() => m.access(7), DmaFault);
  assert.deepEqual(m.pinned(), []);
});

test("outside RAM it faults, and nothing is pinned", () => {
  const m = faulting();
  for (const gfn of [RAM_FRAMES, 2 ** 20 - 1, 2 ** 20, 2 ** 32 + 7, 2 ** 39])
    assert.throws(() => m.access(gfn), DmaFault);
  assert.throws(() => m.access(RAM_FRAMES - 1, 2), DmaFault);
  assert.deepEqual(m.pinned(), [RAM_FRAMES - 1]);
});

test("at the quota it faults, when an unpin frees nothing", () => {
  const m = faulting({ quota: 4 });
  assert.equal(m.map(1, 2, 3), VIRTIO_IOMMU_S_OK);
  m.access(7);
  assert.throws(() => m.access(8, 2), DmaFault);
  assert.ok(m.counters.framesPeak <= 4);
  assert.deepEqual(m.held(1, 2, 3), [true, true, true]);
});

test("at the quota an unpin comes first: of idle frames, and of those that it touched before", () => {
  const m = faulting({ quota: 4 });
  idle(m, 1, 2);
  m.access(5, 2);
  m.access(8);
  assert.deepEqual(m.pinned(), [8]);
});

test("a flood of faults leaves room for what is mapped", () => {
  const m = faulting({ quota: 16 });
  assert.equal(m.map(1), VIRTIO_IOMMU_S_OK);
  for (let gfn = 16; gfn < 1000; gfn++) m.access(gfn);
  assert.ok(m.counters.framesPeak <= 16);
  assert.equal(m.map(2, 3, 4, 5, 6, 7, 8, 9), VIRTIO_IOMMU_S_OK);
  m.tracker.park();
  const room = 16 - m.tracker.pinned;
  for (let gfn = 1000; gfn < 1000 + room; gfn++) m.access(gfn);
  assert.throws(() => m.access(1100), DmaFault, "parked, nothing makes room");
  assert.equal(m.map(1101), VIRTIO_IOMMU_S_NOMEM);
});

test("the host refuses: a DMA fault, and nothing is pinned", () => {
  const m = faulting();
  m.pinner.pagesMax = 0;
  assert.throws(() => m.access(7), DmaFault);
  assert.deepEqual(m.pinned(), []);
});

test("before activation and after PIN off it may fault too, and nothing is unpinned", () => {
  const m = faulting();
  m.tracker.deactivate("pin-off");
  m.access(7);
  m.pass();
  m.pass();
  assert.deepEqual(m.held(7), [true]);
  m.tracker.machineReset();
  assert.deepEqual(m.held(7), [false]);
  m.access(7);
  assert.deepEqual([m.held(7)[0], m.counters.framesFirmware], [true, 0]);
});

test("all RAM as a whole: everything is pinned, and what is not there stays a fault", () => {
  const m = machine({ beforeActivation: "all", wholeRam: true });
  m.iommu.setFaultCapable(0, true);
  assert.equal(m.gate.request(RAM_FRAMES as Gfn), false);
  assert.equal(m.tracker.pinned, RAM_FRAMES);
});

test("a harvest gives all that a fault-capable device can write, claimed by the table or not", () => {
  const m = machine();
  m.iommu.setFaultCapable(0, true);
  m.activate(true, true);
  m.tracker.dirty.start();
  assert.equal(m.gate.request(7 as Gfn), true);
  m.gate.accessEnded();
  assert.equal(m.map(9), VIRTIO_IOMMU_S_OK, "for reading: neither W nor D");
  const harvest = () => [...m.tracker.dirty.harvest().ranges];
  assert.deepEqual(harvest(), [7, 1, 9, 1]);
  assert.deepEqual(harvest(), [7, 1, 9, 1], "as long as it can");
  m.unmap(9);
  for (let i = 0; i < 3; i++) m.pass();
  assert.deepEqual(harvest(), [7, 1, 9, 1], "and once more");
  assert.deepEqual(harvest(), []);
});
