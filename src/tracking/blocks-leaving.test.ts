/** A host that maps each page once: what is pinned as one goes as one. */
import assert from "node:assert/strict";
import test from "node:test";
import { addressOf, HOST_BASE, ramRegion } from "../../test/support/guest.ts";
import {
  behindIommu,
  blocksAlone,
  frames,
  INFINITY,
  passes,
  runs,
  unpinNow,
} from "../../test/support/iommu-guest.ts";
import { active, idle, type Machine, RAM_FRAMES } from "../../test/support/machine.ts";
import type { FakeIommuPinner } from "../../test/support/pinner.ts";
import type { Gfn, Gpa } from "../base/units.ts";
import type { GuestRegion } from "../memory/guest-memory.ts";
import { GfnBuffer, type UnpinPolicy } from "../policy/policy.ts";
import { createPolicy } from "../policy/registry.ts";
import { TU_PINNED as P } from "../wire/dtt.ts";
import { VIRTIO_IOMMU_S_IOERR as IOERR, VIRTIO_IOMMU_S_OK as OK } from "../wire/virtio-iommu.ts";

test("a mapping goes when all of its frames are idle, and not before", () => {
  const m = behindIommu();
  m.map(...frames(0, 10));
  m.unmap(...frames(0, 9));
  passes(m);
  assert.deepEqual([runs(m), m.tracker.pinned, m.counters.framesBeyondNeed], [[[0, 10]], 10, 9]);
  m.unmap(9);
  passes(m);
  assert.deepEqual([runs(m), m.tracker.pinned, m.pinner.pages.size], [[], 0, 0]);
  assert.deepEqual([m.table.word(0), m.gate.allows(0 as Gfn)], [0, false]);
});

test("frames that nobody uses keep P while others of their mapping are used: coming back they ask for nothing", () => {
  const m = behindIommu();
  m.map(...frames(0, 10));
  m.unmap(...frames(1, 9));
  passes(m, 3);
  assert.deepEqual(
    [m.table.word(4), m.held(4), m.counters.framesBeyondNeed, m.counters.pinRequests],
    [P, [true], 9, 1],
  );
  m.map(4);
  m.pass();
  assert.deepEqual([m.counters.pinRequests, m.counters.framesBeyondNeed], [1, 8]);
  m.unmap(0);
  passes(m, 3);
  assert.deepEqual(runs(m), [[0, 10]], "as long as frame 4 is in use");
  m.unmap(4);
  passes(m);
  assert.deepEqual([runs(m), m.counters.framesBeyondNeed], [[], 0]);
});

test("a frame that was used a moment ago keeps those that wait for it, and all go when it has been idle as long as they", () => {
  const m = behindIommu();
  m.map(0, 1);
  m.unmap(1);
  passes(m);
  m.unmap(0);
  m.map(1);
  m.unmap(1);
  m.pass();
  assert.deepEqual([m.held(0, 1), m.table.word(0), m.table.word(1)], [[true, true], P, P]);
  m.pass();
  assert.deepEqual([runs(m), m.table.word(0), m.table.word(1)], [[], 0, 0]);
});

/** Frame `gfn` of the guest's only region has other memory from now on. */
function replaceFrame(m: Machine<FakeIommuPinner>, whole: GuestRegion, gfn: number) {
  const part = (first: number, end: number) => ({
    ...{ gpa: (first * 4096) as Gpa, size: (end - first) * 4096, hostAddress: addressOf(first) },
    bytes: whole.bytes.subarray(first * 4096, end * 4096),
  });
  const other = ramRegion(gfn * 4096, 1, HOST_BASE + 2 ** 40);
  m.tracker.setMemory([part(0, gfn), other, part(gfn + 1, RAM_FRAMES)]);
}

/** A guest whose host tries just the frames it is told to: `tries(...)` is a pass. */
function trying(regions: readonly GuestRegion[]) {
  let given: number[] = [];
  const lru = createPolicy("lru");
  const policy: UnpinPolicy = {
    ...{ name: "given", parameters: lru.parameters, pinned() {}, tried() {} },
    candidates: (_now, _limit, out) => {
      for (const gfn of given.splice(0)) out.push(gfn as Gfn);
    },
  };
  const m = behindIommu({ policy, regions });
  const tries = (...gfns: number[]) => {
    given = gfns;
    m.pass();
  };
  return { m, tries, beyondNeed: () => m.counters.framesBeyondNeed };
}

/** Frames 0 to 2, which share a mapping, are not in use, and 0 and 1 wait. */
function twoWait() {
  const whole = ramRegion(0, RAM_FRAMES);
  const setting = { ...trying([whole]), whole };
  idle(setting.m, 0, 1, 2);
  setting.tries(0, 1, 2); // clears A
  setting.tries(0, 1);
  assert.equal(setting.beyondNeed(), 2);
  return setting;
}

test("those that wait go with the last one, and are tried again before", () => {
  const { m, tries, beyondNeed } = twoWait();
  tries(2);
  assert.deepEqual([runs(m), m.counters.framesUnpinned, beyondNeed()], [[], 3, 0]);
  const again = twoWait();
  again.m.map(1);
  again.m.unmap(1);
  again.tries(2);
  assert.deepEqual([again.m.held(0, 1, 2), again.beyondNeed()], [[true, true, true], 2], "1 was used");
  again.tries(1);
  assert.deepEqual([runs(again.m), again.beyondNeed()], [[], 0]);
});

test("one that waits and is tried with the last one is counted once", () => {
  const { m, tries } = twoWait();
  tries(1, 2);
  assert.deepEqual([runs(m), m.counters.framesUnpinned], [[], 3]);
});

test("one that waits and has to leave is beyond need once", () => {
  const { m, beyondNeed } = twoWait();
  m.map(2);
  assert.deepEqual(unpinNow(m, 0, 2), [0, 1]);
  assert.equal(beyondNeed(), 2);
  m.map(0);
  assert.equal(beyondNeed(), 1);
  const moved = twoWait();
  replaceFrame(moved.m, moved.whole, 1);
  assert.deepEqual([moved.beyondNeed(), moved.m.held(0, 2)], [2, [true, true]]);
});

test("a mapping of more frames than a slice tries goes all the same", () => {
  const m = behindIommu();
  m.map(...frames(512, 512));
  assert.deepEqual(runs(m), [[512, 512]]);
  m.unmap(...frames(512, 512));
  passes(m);
  assert.deepEqual([runs(m), m.counters.framesUnpinned], [[], 512]);
});

test("idle mappings go with one call over the holes between them, not over a mapping in use, nor over what is no RAM", () => {
  const [low, high] = [ramRegion(0, 250), ramRegion(256 * 4096, RAM_FRAMES - 256)];
  const m = behindIommu({ regions: [low, high] });
  for (const gfn of [257, 20, 16, 14, 12, 249, 10]) m.map(gfn);
  m.unmap(10, 12, 16, 20, 249, 257);
  passes(m);
  assert.deepEqual([runs(m), m.pinner.unmaps], [[[14, 1]], 3]);
});

test("a frame that had to leave takes its page over without a word to the host", () => {
  const m = behindIommu({ quota: 10 });
  m.map(...frames(0, 10));
  m.unmap(...frames(1, 9));
  unpinNow(m);
  m.pinner.before = () => assert.fail("the host is asked");
  assert.equal(m.map(4), OK, "though the quota has no room");
  assert.deepEqual([m.gate.allows(4 as Gfn), m.gate.allows(5 as Gfn), m.tracker.pinned], [true, false, 10]);
});

test("orphans are told of in slices, in every part of a large guest", () => {
  const far = 2 ** 20 - 2048; // some 2,000 blocks on
  const regions = [ramRegion(0, RAM_FRAMES), ramRegion(far * 4096, 1024)];
  const m = behindIommu({ regions, levels: 3 });
  for (const gfn of [10, 600, far + 5, far + 700]) m.table.unit(gfn);
  for (const gfn of [10, 600, far + 5, far + 700]) assert.equal(m.map(gfn, gfn + 1), OK);
  m.unmap(10, 600, far + 5, far + 700);
  assert.deepEqual(
    unpinNow(m).filter((gfn) => [10, 600, far + 5, far + 700].includes(gfn)),
    [...[10, 600, far + 5, far + 700]],
  );
});

test("the host does not release a mapping: its frames are pinned as before", () => {
  const m = behindIommu();
  m.map(...frames(0, 3));
  m.unmap(...frames(0, 3));
  m.pinner.releasesMax = 0;
  passes(m);
  assert.deepEqual([m.held(0, 1, 2), m.table.word(1), m.tracker.pinned], [[true, true, true], P, 3]);
  m.pinner.releasesMax = INFINITY;
  passes(m);
  assert.deepEqual([runs(m), m.tracker.pinned], [[], 0]);
});

test("what must go while the host keeps it is tried again, unless somebody needs it before", () => {
  const m = behindIommu();
  idle(m, ...frames(0, 3), 600);
  m.pinner.releasesMax = 0;
  m.tracker.machineReset();
  assert.deepEqual([m.tracker.pinned, [...m.tracker.frames()]], [4, []]);
  for (const gfn of [0, 1, 2, 600]) m.table.set(gfn, 0);
  m.activate();
  assert.equal(m.map(1), OK);
  m.pinner.releasesMax = INFINITY;
  passes(m);
  assert.deepEqual([runs(m), m.held(1), m.tracker.pinned], [[[0, 3]], [true], 3]);
});

test("an operator learns which pages stay pinned with their neighbours, and nothing grows over what he had unpinned", () => {
  const m = behindIommu();
  m.map(...frames(0, 6));
  m.unmap(1, 2, 3, 4);
  assert.deepEqual(unpinNow(m, 2, 4), [2, 3]);
  assert.deepEqual(unpinNow(m), [0, 5, 1, 2, 3, 4]);
  m.unmap(0, 5);
  assert.deepEqual(unpinNow(m, 0, 8), []);
  for (const gfn of [0, 1, 2, 4]) m.map(gfn);
  assert.deepEqual(runs(m), [
    [0, 1],
    [1, 1],
    [2, 1],
    [4, 1],
  ]);
});

test("a page that was discarded under its mapping is never taken over", () => {
  const m = behindIommu();
  m.map(...frames(0, 4));
  m.unmap(1, 2, 3);
  passes(m);
  m.pinner.holes.add(addressOf(2));
  assert.deepEqual(unpinNow(m, 0, INFINITY, true), [2]);
  m.pinner.holes.delete(addressOf(2)); // the guest has other memory there now
  assert.deepEqual(unpinNow(m, 0, INFINITY, true), [2]);
  assert.equal(m.map(2), IOERR);
  assert.equal(m.map(1), OK);
  m.unmap(0, 1, 2);
  passes(m);
  assert.deepEqual(runs(m), []);
  assert.equal(m.map(2), OK);
});

test("a page without memory now is not taken over either, whoever has discarded it", () => {
  const m = behindIommu();
  m.map(...frames(0, 4));
  m.unmap(1, 2, 3);
  unpinNow(m);
  m.pinner.holes.add(addressOf(3));
  assert.deepEqual([m.map(3), m.map(1)], [IOERR, OK]);
});

test("a frame with other memory than its mapping is refused, as long as that is in use", () => {
  const whole = ramRegion(0, RAM_FRAMES);
  const m = behindIommu({ regions: [whole] });
  m.map(...frames(0, 4));
  m.unmap(2);
  passes(m);
  replaceFrame(m, whole, 2);
  assert.deepEqual([m.map(2), m.held(0, 1, 3)], [IOERR, [true, true, true]]);
  m.unmap(0, 1, 2, 3);
  passes(m);
  assert.equal(m.map(2), OK);
});

test("pins of an earlier backend are taken over, mapping by mapping", () => {
  const before = behindIommu();
  before.map(...frames(500, 20), 700);
  const handles = [...before.pinner.mappings].flatMap(([handle, gfns]) =>
    gfns.map((gfn) => [gfn as Gfn, handle] as const),
  );
  const pinner = before.pinner;
  const after = active({ pinner });
  after.tracker.adopt(handles);
  assert.deepEqual([after.tracker.pinned, [...after.tracker.frames()].length], [21, 21]);
  assert.equal(after.tracker.pin([{ gfn: 505, nrFrames: 3 }]), OK, "nothing is mapped twice");
});

test("frames may be asked for in any order, behind one whose page is pinned without it too", () => {
  const { blocks, ledger, pinner } = blocksAlone(0, 16);
  const pin = (...gfns: number[]) =>
    blocks.pin(gfns as Gfn[], (gfn, handle) => void ledger.add(gfn, handle, 1));
  pin(4, 5);
  const five = new GfnBuffer(1);
  five.push(5 as Gfn);
  blocks.release(five, Int32Array.of(ledger.remove(5 as Gfn)));
  pin(9, 7, 5, 8, 2);
  const mappings = [...pinner.mappings.values()].sort(([a], [b]) => a! - b!);
  assert.deepEqual(mappings, [[2], [4, 5], [7, 8, 9]]);
});

test("those that wait come along as far as there is room in the list", () => {
  const { blocks, ledger } = blocksAlone(0, 8);
  blocks.pin(frames(0, 8) as Gfn[], (gfn, handle) => void ledger.add(gfn, handle, 1));
  const listOf = (capacity: number, ...gfns: number[]) => {
    const list = new GfnBuffer(capacity);
    for (const gfn of gfns) list.push(gfn as Gfn);
    return list;
  };
  const waiting: number[] = [];
  blocks.dropWaiting(listOf(7, ...frames(0, 7)), (gfn) => waiting.push(gfn));
  assert.deepEqual([waiting, blocks.waiting], [frames(0, 7), 7]);
  const added = (capacity: number) => {
    const list = listOf(capacity, 7);
    blocks.addOthers(list);
    return list.length - 1;
  };
  assert.deepEqual([added(7), added(8)], [0, 7]);
});
