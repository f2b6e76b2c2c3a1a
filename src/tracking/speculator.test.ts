import assert from "node:assert/strict";
import test from "node:test";
import { addressOf, ramRegion } from "../../test/support/guest.ts";
import { active, idle, type Machine, machine, RAM_FRAMES } from "../../test/support/machine.ts";
import { account, guessing, passes, pinned, speculate } from "../../test/support/speculating.ts";
import type { Gfn } from "../base/units.ts";
import { createSpeculation } from "../policy/speculation/registry.ts";
import { TU_ACCESSED as A, TU_DIRTY as D, TU_PINNED as P, TU_WRITABLE as W } from "../wire/dtt.ts";
import { VIRTIO_IOMMU_S_IOERR as IOERR, VIRTIO_IOMMU_S_OK as OK } from "../wire/virtio-iommu.ts";

// --- what is pinned ------------------------------------------------------------------------------------------------

test("what is likely next is pinned beside what is asked for, and the guest finds P set", () => {
  const m = guessing(2);
  assert.equal(m.map(5), OK);
  assert.deepEqual(
    [pinned(m), m.held(5, 6, 7)],
    [
      [5, 6, 7],
      [true, true, true],
    ],
  );
  assert.deepEqual([m.table.word(6), m.table.word(7)], [P, P]);
  assert.equal(m.map(6, 7), OK);
  assert.equal(m.counters.pinRequests, 1, "the guest did not ask");
  assert.deepEqual([m.counters.framesPinned, m.counters.framesSpeculative, m.counters.framesNow], [3, 2, 3]);
});

test("the pages are pinned before P is set", () => {
  const m = guessing(3);
  const words: number[] = [];
  m.pinner.before = () => words.push(...[6, 7, 8].map((gfn) => m.table.word(gfn)));
  m.map(5);
  assert.equal(words.length, 3 * 4);
  assert.deepEqual(
    words.filter((word) => word !== 0),
    [],
  );
});

test("off, nothing is pinned that is not asked for", () => {
  const m = active();
  m.map(5);
  assert.deepEqual(pinned(m), [5]);
});

test("only RAM with a unit that says nothing, and that is not pinned, is pinned unasked", () => {
  const m = guessing(6, { regions: [ramRegion(0, 10), ramRegion(12 * 4096, RAM_FRAMES - 12)] });
  idle(m, 100); // and its neighbours, which are far
  const far = pinned(m);
  m.table.set(6, A);
  m.table.set(7, 1);
  m.table.set(8, W);
  m.table.set(9, P); // forged
  m.table.set(12, D); // of an earlier time
  m.map(5);
  assert.deepEqual(
    pinned(m).filter((gfn) => !far.includes(gfn)),
    [5, 12, 13, 14, 15, 16, 17],
    "10 and 11 are no RAM",
  );
  assert.equal(m.table.word(12), (P + D) >>> 0);
});

test("a frame without a leaf in the table is not pinned unasked", () => {
  const m = machine({ ...speculate("stride,repeats=1,budget=1"), levels: 2 });
  m.table.unit(0);
  m.tracker.activate(m.table.root, 2, true);
  for (const gfn of [1000, 1010]) m.map(gfn);
  assert.equal(m.map(1020), OK);
  assert.deepEqual(pinned(m), [1000, 1010, 1020]);
});

test("a request that is refused pins nothing beside itself either", () => {
  const m = guessing(2);
  m.pinner.pagesMax = 1;
  assert.equal(m.map(5, 900), IOERR);
  assert.equal(
    m.tracker.pin([
      { gfn: 5, nrFrames: 1 },
      { gfn: 1024 * 4, nrFrames: 1 },
    ]) === OK,
    false,
  );
  assert.deepEqual(pinned(m), []);
});

test("a host that refuses what was not asked for refuses nothing of the request", () => {
  const m = guessing(8);
  m.pinner.pagesMax = 4;
  assert.equal(m.map(5), OK);
  assert.deepEqual([pinned(m), account(m)], [[5], [0, 0, 0]]);
  assert.deepEqual(m.table.word(6), 0);
});

test("it takes at most half of what the quota leaves, and unpins nothing for it", () => {
  const m = guessing(8, { quota: 11 });
  idle(m, 100, 200, 300);
  const before = pinned(m);
  assert.equal(before.length, 3 + 4);
  m.map(400);
  assert.deepEqual([pinned(m).length, m.counters.framesUnpinned], [8 + 1, 0]);
  m.map(600);
  assert.deepEqual([pinned(m).length, m.counters.framesUnpinned], [10, 0], "half of one is none");
});

test("at the quota, what was pinned unasked makes room for what is asked for", () => {
  const m = guessing(8, { quota: 8 });
  assert.equal(m.map(5), OK);
  assert.equal(pinned(m).length, 1 + 3);
  assert.equal(m.map(100, 101, 102, 103, 104), OK);
  assert.deepEqual([pinned(m).length <= 8, m.held(5, 104)], [true, [true, true]]);
});

test("memory that was discarded does not come back by it", () => {
  const m = guessing(2);
  m.pinner.holes.add(addressOf(6));
  m.map(5);
  assert.deepEqual([pinned(m), m.pinner.holes.has(addressOf(6))], [[5, 7], true]);
});

test("nor what is discarded after the look", () => {
  const m = guessing(2);
  m.pinner.before = () => {
    if (m.tracker.pinned > 0) m.pinner.holes.add(addressOf(7));
  };
  m.map(5);
  assert.deepEqual([pinned(m), m.pinner.holes.has(addressOf(7))], [[5], true]);
});

test("a host that cannot tell what was discarded pins nothing unasked", () => {
  const m = guessing(2);
  m.pinner.discarded = () => {
    m.pinner.pagesMax = 0;
    m.pinner.pin(Float64Array.of(0), 1, new Int32Array(1));
  };
  assert.equal(m.map(5), OK);
  assert.deepEqual(pinned(m), [5]);
});

test("memory without an address in this process is never asked for what was discarded", () => {
  const { presentAddress: _, ...region } = ramRegion(0, RAM_FRAMES);
  const m = guessing(2, { regions: [{ ...region, hostAddress: 0 }] });
  m.pinner.discarded = () => assert.fail("there is nothing to look at");
  m.map(5);
  assert.deepEqual(pinned(m), [5, 6, 7]);
});

test("what domains map and what devices touch brings nothing along", () => {
  const m = guessing(2);
  m.iommu.setFaultCapable(0, true);
  assert.equal(m.tracker.hold({ first: 77, last: 77, gfn: 5 as Gfn, flags: 3 }), OK);
  assert.equal(m.gate.request(100 as Gfn), true);
  assert.deepEqual(pinned(m), [5, 100]);
});

test("parked, by guest or operator, no unit changes that nobody has asked for: the driver may be freeing leaves", () => {
  for (const park of [(m: Machine) => m.tracker.park(), (m: Machine) => m.tracker.parkByOperator(true)]) {
    const m = guessing(2);
    park(m);
    m.map(5);
    assert.deepEqual(pinned(m), [5]);
  }
});

test("what an operator has had unpinned is not pinned unasked, until the guest asks for it, or the speculation is set again", () => {
  const m = guessing(2);
  m.tracker.unpinIdle({ first: 6, end: 8, from: 0 });
  m.map(5, 100);
  assert.deepEqual(pinned(m), [5, 100, 101, 102], "not 6 and 7");
  m.tracker.unpinIdle({ first: 0, end: RAM_FRAMES, from: 0, discarded: true });
  m.map(200);
  assert.deepEqual(pinned(m).slice(-3), [200, 201, 202], "a look for what was discarded forbids nothing");
  const again = () => {
    m.unmap(5);
    passes(m, 2);
    m.map(5);
  };
  idle(m, 6);
  again();
  assert.deepEqual(m.held(6, 7), [true, false], "it has asked for 6");
  m.tracker.unpinIdle({ first: 6, end: 7, from: 0 });
  again();
  assert.deepEqual(m.held(6, 7), [false, false], "6 was unpinned anew");
  m.tracker.setSpeculation(createSpeculation("neighbours,budget=2"));
  again();
  assert.deepEqual(m.held(6, 7), [true, true]);
});

test("however many ranges an operator has had unpinned, none of them is pinned unasked", () => {
  const m = guessing(512);
  for (let gfn = 1; gfn < 400; gfn += 2) m.tracker.unpinIdle({ first: gfn, end: gfn + 1, from: 0 });
  m.map(0);
  assert.deepEqual(
    pinned(m).filter((gfn) => gfn < 400 && gfn % 2 === 1),
    [],
  );
  assert.ok(m.held(450)[0]);
});

test("of at most 1,024 frames it may be unknown whether the guest uses them", () => {
  const m = guessing(512, { policy: { ...active().tracker.policy, candidates() {} } });
  for (const gfn of [0, 512, 1024, 1300]) m.map(gfn);
  assert.equal(m.counters.framesSpeculative, 1024);
  for (let gfn = 1; gfn < 512; gfn++) m.map(gfn);
  m.map(1400);
  assert.equal(m.counters.framesSpeculative > 1024, true, "some have been found in use");
});

// --- whose it is ---------------------------------------------------------------------------------------------------

test("the guest has not asked for it: it is not claimed until it is used", () => {
  const m = guessing(2);
  m.map(5);
  assert.deepEqual(m.claims(), [1, 1]);
  m.map(6);
  m.pass();
  assert.deepEqual(
    [m.claims(), account(m)],
    [
      [2, 2],
      [2, 1, 1],
    ],
  );
});

for (const complete of [true, false])
  test(`COMPLETE ${complete}: unused it goes with the next pass, wasted; used it stays, saved, until it is idle`, () => {
    const m = guessing(3, {}, complete);
    m.map(5);
    assert.equal(m.map(6), OK);
    m.map(7);
    m.unmap(7);
    m.pass();
    assert.deepEqual(
      [pinned(m), account(m)],
      [
        [5, 6, 7],
        [3, 2, 1],
      ],
    );
    assert.deepEqual([m.table.word(8), m.held(8)], [0, [false]]);
    m.pass();
    assert.deepEqual(pinned(m), [5, 6]);
    m.unmap(5, 6);
    passes(m, 2);
    assert.deepEqual([pinned(m), account(m)], [[], [3, 2, 1]]);
  });

test("a request finds out what was used of what earlier ones have brought along", () => {
  const m = guessing(2);
  m.map(5, 6, 7);
  m.map(8, 9);
  assert.deepEqual(account(m), [2, 0, 0]);
  m.map(100);
  assert.deepEqual(
    [account(m), m.claims()],
    [
      [4, 2, 0],
      [6, 6],
    ],
  );
});

test("a guest that asks for it all the same has used it", () => {
  const m = guessing(1);
  m.map(5);
  m.table.map(6);
  assert.equal(m.tracker.pin([{ gfn: 6, nrFrames: 1 }]), OK);
  assert.deepEqual(account(m).slice(1), [1, 0]);
});

test("a force-unpin takes what is unused, and what was used lately, which is saved all the same", () => {
  const m = guessing(2);
  m.map(5);
  idle(m, 6);
  m.tracker.unpinIdle({ first: 0, end: RAM_FRAMES, from: 0 });
  assert.deepEqual([pinned(m), account(m)], [[5], [2, 1, 1]]);
});

test("a release that the host refuses leaves it as it was, with P", () => {
  const m = guessing(1);
  m.map(5);
  m.pinner.releasesMax = 0;
  m.pass();
  assert.deepEqual([m.table.word(6), m.held(6), account(m)], [P, [true], [1, 0, 0]]);
  assert.equal(m.map(6), OK);
  m.pass();
  assert.deepEqual(account(m), [1, 1, 0]);
});

test("P that the guest clears keeps it pinned, as of any frame", () => {
  const m = guessing(1);
  m.map(5);
  m.table.set(6, 0);
  passes(m, 3);
  assert.deepEqual([m.held(6), account(m)], [[true], [1, 0, 0]]);
});

test("a domain that maps it is no use of P; when it lets go, all is as before", () => {
  const m = guessing(1);
  m.map(5);
  const mapping = { first: 77, last: 77, gfn: 6 as Gfn, flags: 3 };
  assert.equal(m.tracker.hold(mapping), OK);
  m.pass();
  assert.deepEqual([m.held(6), m.claims(), account(m)], [[true], [2, 2], [1, 0, 0]]);
  m.tracker.letGo([mapping]);
  assert.deepEqual([m.held(6), m.claims()[0]], [[true], 1]);
  m.pass();
  assert.deepEqual([m.held(6), account(m)], [[false], [1, 0, 1]]);
});

test("memory that leaves the guest, and a machine reset, take it along, and judge it not", () => {
  const m = guessing(4);
  m.map(5);
  m.tracker.setMemory([ramRegion(0, 7), ramRegion(8 * 4096, RAM_FRAMES - 8)]);
  assert.deepEqual(pinned(m), [5, 6, 8, 9]);
  m.tracker.machineReset();
  assert.deepEqual([pinned(m), account(m)], [[], [4, 0, 0]]);
});

for (const complete of [true, false])
  test(`PIN off and on again, COMPLETE ${complete}: it is what an earlier table has left`, () => {
    const m = guessing(3, {}, complete);
    m.map(5);
    m.map(6); // of which nobody knows
    m.tracker.deactivate("pin-off");
    assert.deepEqual(
      [m.claims(), account(m)],
      [
        [2, 2],
        [3, 1, 0],
      ],
    );
    m.tracker.setSpeculation(createSpeculation("off"));
    for (const gfn of [5, 6, 7, 8]) m.table.set(gfn, 0); // another driver knows nothing of it
    m.activate(complete);
    passes(m, 3);
    assert.deepEqual(pinned(m), complete ? [] : [5, 6, 7, 8], "a device may still have it mapped");
    assert.deepEqual(account(m), [3, 1, 0]);
  });

test("PIN on again while it is on is another table too", () => {
  const m = guessing(1, {}, false);
  m.map(5);
  m.activate(false);
  passes(m, 3);
  assert.deepEqual(
    [pinned(m), account(m)],
    [
      [5, 6],
      [1, 0, 0],
    ],
  );
});
