import assert from "node:assert/strict";
import test from "node:test";
import { active, idle } from "../../test/support/machine.ts";
import type { Gfn } from "../base/units.ts";
import type { UnpinPolicy } from "../policy/policy.ts";
import { createPolicy } from "../policy/registry.ts";
import { TU_ACCESSED as A, TU_PINNED as P } from "../wire/dtt.ts";
import { VIRTIO_IOMMU_S_NOMEM as NOMEM, VIRTIO_IOMMU_S_OK as OK } from "../wire/virtio-iommu.ts";

const frames = (first: number, count: number) => Array.from({ length: count }, (_, i) => first + i);

test("second chance: an idle frame that was accessed is kept by one pass and unpinned by the next", () => {
  const m = active();
  idle(m, 5);
  assert.equal(m.table.word(5), P + A);
  m.pass();
  assert.deepEqual([m.table.word(5), m.held(5)], [P, [true]]);
  m.pass();
  assert.deepEqual([m.table.word(5), m.held(5)], [0, [false]]);
});

test("a frame that is used between passes stays", () => {
  const m = active();
  for (let i = 0; i < 5; i++) {
    idle(m, 5);
    m.pass();
  }
  assert.deepEqual([m.held(5), m.counters.framesPinned], [[true], 1]);
});

test("a mapped frame stays, however many passes there are", () => {
  const m = active();
  m.map(5);
  for (let i = 0; i < 5; i++) m.pass();
  assert.deepEqual([m.held(5), m.table.word(5)], [[true], P + 1]);
  assert.equal(m.counters.framesMapped, 1);
});

test("a frame that is pinned again after its unpin has a new pin", () => {
  const m = active();
  idle(m, 5);
  m.pass();
  m.pass();
  assert.equal(m.map(5), OK);
  assert.deepEqual([m.held(5), m.counters.framesPinned, m.counters.framesUnpinned], [[true], 2, 1]);
});

test("a pass goes on in slices of at most 256 frames, and a request is served between them", () => {
  const m = active();
  idle(m, ...frames(0, 600));
  m.pass();
  m.tracker.startPass();
  const slices: number[] = [];
  for (let more = true; more; ) {
    const before = m.counters.framesUnpinned;
    more = m.tracker.slice();
    slices.push(m.counters.framesUnpinned - before);
    if (slices.length === 1) assert.equal(m.map(700), OK);
  }
  assert.deepEqual(slices, [256, 256, 88, 0]);
  assert.deepEqual(m.held(0, 599, 700), [false, false, true]);
});

test("a pass that is under way is not begun again; without one, a slice does nothing", () => {
  const m = active();
  idle(m, 5);
  assert.equal(m.tracker.slice(), false);
  m.tracker.startPass();
  m.tracker.startPass();
  assert.equal(m.counters.passes, 1);
});

test("parked: no pass begins, one that is under way ends, and passes work again after unpark", () => {
  const m = active();
  idle(m, ...frames(0, 600));
  m.pass();
  m.tracker.startPass();
  m.tracker.slice();
  m.tracker.park();
  assert.equal(m.tracker.slice(), false);
  m.pass();
  assert.equal(m.tracker.pinned, 600 - 256);
  m.tracker.unpark();
  m.pass();
  assert.equal(m.tracker.pinned, 0);
});

for (const [granted, left] of [
  [0, [0, 2, 4]],
  [1, [2, 4]],
  [2, [4]],
] as const)
  test(`the host releases ${granted} of 3 pages: P and the IOMMU entries of the others are back`, () => {
    const m = active();
    idle(m, 0, 2, 4);
    m.pass();
    m.pinner.releasesMax = granted;
    m.pass();
    assert.deepEqual(
      m.held(0, 2, 4),
      [0, 2, 4].map((gfn) => (left as readonly number[]).includes(gfn)),
    );
    for (const gfn of [0, 2, 4])
      assert.equal(m.table.word(gfn), (left as readonly number[]).includes(gfn) ? P : 0);
    m.pinner.releasesMax = Number.POSITIVE_INFINITY;
    m.pass();
    assert.equal(m.tracker.pinned, 0, "a later pass tries again");
  });

test("a device that keeps its DMA window open makes the claims be taken back, and nothing is released", () => {
  const m = active();
  idle(m, 0, 1);
  m.pass();
  m.clock.step = 1_000_000;
  m.gate.enter();
  m.pass();
  assert.deepEqual([m.held(0, 1), m.table.word(0), m.table.word(1)], [[true, true], P, P]);
  m.gate.leave();
  m.pass();
  assert.deepEqual(m.held(0, 1), [false, false]);
});

test("a unit that the guest takes away keeps its frame pinned; it may come back", () => {
  const m = active();
  idle(m, 5);
  const before = m.table.word(5);
  const entry = m.table.entry(5, 2);
  m.memory.and32(entry, ~1);
  for (let i = 0; i < 3; i++) m.pass();
  assert.deepEqual(m.held(5), [true]);
  m.memory.or32(entry, 1);
  assert.equal(m.table.word(5), before);
});

test("a P that the guest cleared does not release the page: abi.md section 4, a unit is exactly P", () => {
  const m = active();
  idle(m, 5);
  m.table.set(5, 0);
  for (let i = 0; i < 3; i++) m.pass();
  assert.deepEqual(m.held(5), [true]);
});

test("candidates are tried in the order of the policy, the longest untried first", () => {
  const order: number[] = [];
  const lru = createPolicy("lru");
  const { tried } = lru;
  lru.tried = (...args) => {
    order.push(args[0]);
    tried(...args);
  };
  const m = active({ policy: lru });
  m.map(9, 2 ** 9);
  m.map(3);
  m.pass();
  m.map(5);
  m.pass();
  assert.deepEqual(order, [9, 512, 3, 9, 512, 3, 5]);
});

test("a pass ends, whatever its policy gives", () => {
  const m = active();
  m.map(1);
  const always = {
    ...createPolicy("off"),
    candidates: (...[, , out]: Parameters<UnpinPolicy["candidates"]>) => out.push(1 as Gfn),
  };
  m.tracker.setPolicy(always);
  m.tracker.startPass();
  let slices = 0;
  while (m.tracker.slice()) assert.ok(++slices < 1000, "it does not end");
  assert.ok(slices > 1);
});

// --- counters -------------------------------------------------------------------------------------------------------------------

test("counters: requests, refusals, frames now and at their peak, pins and unpins", () => {
  const m = active();
  idle(m, ...frames(0, 10));
  m.pinner.pagesMax = 10;
  m.map(20);
  m.pass();
  m.pass();
  m.map(30);
  const { pinRequests, pinRequestsRefused, framesPinned, framesUnpinned, framesNow, framesPeak, passes } =
    m.counters;
  assert.deepEqual(
    { pinRequests, pinRequestsRefused, framesPinned, framesUnpinned, framesNow, framesPeak, passes },
    {
      pinRequests: 3,
      pinRequestsRefused: 0,
      framesPinned: 12,
      framesUnpinned: 10,
      framesNow: 2,
      framesPeak: 10,
      passes: 2,
    },
  );
});

test("a refused request counts as refused", () => {
  const m = active({ quota: 0 });
  m.map(1);
  assert.deepEqual(
    [m.counters.pinRequests, m.counters.pinRequestsRefused, m.counters.framesPinned],
    [1, 1, 0],
  );
});

test("frameTime is the integral of the frames pinned over time", () => {
  const m = active();
  m.clock.step = 0;
  const wait = (ns: number) => {
    m.clock.time += ns;
  };
  m.map(1, 2); //         2 frames from here
  const began = m.counters.frameTime;
  wait(100);
  m.map(3); //            3 frames
  wait(1000);
  m.unmap(1, 2, 3);
  m.pass(); //            second chance: still 3
  wait(10);
  m.pass(); //            0
  wait(5000);
  m.tracker.slice();
  m.map(9);
  assert.equal(m.counters.frameTime - began, 2 * 100 + 3 * 1010);
  assert.equal(m.counters.changedAt, m.clock.time);
});

test("the kernel's count is sampled before a pass, where it is highest", () => {
  const m = active();
  idle(m, ...frames(0, 10));
  m.pass();
  m.pass();
  assert.deepEqual([m.counters.kernelPagesPeak, m.pinner.pages.size], [10, 0]);
});

test("a request that needs room during a pass does not count mapped frames twice", () => {
  const m = active({ quota: 4 });
  assert.equal(m.map(1, 2, 3), 0);
  m.tracker.startPass();
  assert.equal(m.tracker.slice(), true);
  assert.equal(m.map(4, 5), NOMEM);
  assert.equal(m.tracker.slice(), false);
  assert.equal(m.counters.framesMapped, 3);
});

test("a pass that is parked on its way does not say how many frames are mapped", () => {
  const m = active();
  assert.equal(m.map(1, 2, 3), 0);
  m.pass();
  m.unmap(1);
  m.tracker.startPass();
  m.tracker.park();
  assert.equal(m.tracker.slice(), false);
  assert.equal(m.counters.framesMapped, 3);
});
