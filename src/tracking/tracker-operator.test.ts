/** What an operator may change while the guest is live: policy, quota, parking, and unpinning now. */
import assert from "node:assert/strict";
import test from "node:test";
import { addressOf } from "../../test/support/guest.ts";
import { active, idle, type Machine, machine } from "../../test/support/machine.ts";
import { HostError } from "../base/errors.ts";
import type { Gfn, Nanoseconds } from "../base/units.ts";
import type { UnpinPolicy } from "../policy/policy.ts";
import { createPolicy, policies } from "../policy/registry.ts";
import { TU_ACCESSED as A, TU_PINNED as P } from "../wire/dtt.ts";
import { VIRTIO_IOMMU_S_NOMEM as NOMEM, VIRTIO_IOMMU_S_OK as OK } from "../wire/virtio-iommu.ts";
import { LIVES } from "./life.ts";

const frames = (first: number, count: number) => Array.from({ length: count }, (_, i) => first + i);
const INFINITY = Number.POSITIVE_INFINITY;

/** Knows what it was told, and that nothing is told twice. */
class Listener implements UnpinPolicy {
  readonly name = "listener";
  readonly parameters = {};
  readonly known = new Set<number>();
  readonly #lru = createPolicy("lru");
  pinned(gfn: Gfn, now: Nanoseconds): void {
    assert.ok(!this.known.has(gfn), `told of frame ${gfn} twice`);
    this.known.add(gfn);
    this.#lru.pinned(gfn, now);
  }
  tried(...[gfn, outcome, now]: Parameters<UnpinPolicy["tried"]>): void {
    if (outcome === "claimed" || outcome === "gone") this.known.delete(gfn);
    this.#lru.tried(gfn, outcome, now);
  }
  candidates(...asked: Parameters<UnpinPolicy["candidates"]>): void {
    this.#lru.candidates(...asked);
  }
}

const checkKnown = (m: Machine, policy: Listener): void =>
  assert.deepEqual([...policy.known].sort(), [...m.tracker.frames()].sort());

/** Unpin now, slice by slice, with `between` two of them. */
function unpinNow(m: Machine, first = 0, end = INFINITY, between = () => {}) {
  const done = { unpinned: 0, stayed: 0, slices: 0 };
  for (let from: number | null = 0; from !== null; ) {
    const slice: ReturnType<typeof m.tracker.unpinIdle> = m.tracker.unpinIdle({ first, end, from });
    done.unpinned += slice.unpinned;
    done.stayed += slice.stayed.length;
    done.slices++;
    from = slice.next;
    if (from !== null) between();
  }
  return done;
}

test("a new policy knows every frame that is pinned, and unpins what is idle", () => {
  const m = active();
  idle(m, ...frames(0, 600));
  const policy = new Listener();
  m.tracker.setPolicy(policy);
  m.pass();
  checkKnown(m, policy);
  assert.equal(policy.known.size, 600);
  m.pass();
  assert.deepEqual([m.tracker.pinned, policy.known.size], [0, 0]);
});

test("a policy is told in slices; what is pinned and unpinned between them is told once, or not at all", () => {
  const m = active();
  idle(m, ...frames(0, 600));
  const policy = new Listener();
  m.tracker.setPolicy(policy);
  m.map(600);
  m.tracker.startPass();
  assert.equal(m.tracker.slice(), true);
  assert.equal(policy.known.size, 256);
  // One that it knows goes, one that it does not know yet, and their places are taken.
  for (const gfn of [3, 500]) assert.equal(unpinNow(m, gfn, gfn + 1).unpinned, 1);
  m.map(700, 701, 702);
  while (m.tracker.slice());
  checkKnown(m, policy);
  assert.deepEqual(m.held(3, 500, 600, 700, 701, 702), [false, false, true, true, true, true]);
});

test("a pass that is under way ends with the policy that it began with, and says nothing of what is mapped", () => {
  const m = active();
  idle(m, ...frames(0, 600));
  m.map(700);
  m.pass();
  assert.equal(m.counters.framesMapped, 1);
  m.tracker.startPass();
  m.tracker.slice();
  assert.equal(m.tracker.pinned, 601 - 256);
  const policy = new Listener();
  m.tracker.setPolicy(policy);
  assert.equal(m.tracker.slice(), false);
  assert.deepEqual([m.tracker.pinned, m.counters.framesMapped], [601 - 256, 1]);
  m.pass();
  checkKnown(m, policy);
  assert.deepEqual([m.tracker.pinned, m.held(700)], [1, [true]]);
});

test("to off and back: what was pinned meanwhile is not lost", () => {
  const m = active();
  idle(m, 1);
  m.tracker.setPolicy(createPolicy("off"));
  idle(m, 2);
  for (let i = 0; i < 3; i++) m.pass();
  assert.deepEqual(m.held(1, 2), [true, true]);
  m.tracker.setPolicy(createPolicy("lru"));
  for (let i = 0; i < 2; i++) {
    m.pass();
  }
  assert.deepEqual(m.held(1, 2), [false, false]);
});

for (const { name } of policies)
  test(`a request that needs room finds it, whatever policy ${name} would have tried`, () => {
    const m = active({ quota: 300 });
    idle(m, ...frames(0, 300));
    m.tracker.setPolicy(createPolicy(name));
    assert.equal(m.map(1000), OK);
    assert.deepEqual(m.held(1000, 0), [true, false]);
  });

test("a lower quota tears nothing out, and refuses new pins until enough is unpinned", () => {
  const m = active();
  assert.equal(m.map(...frames(0, 20)), OK);
  m.tracker.setQuota(10);
  assert.deepEqual([m.tracker.pinned, m.tracker.quota, m.counters.quota], [20, 10, 10]);
  assert.equal(m.map(30), NOMEM);
  m.unmap(30);
  assert.equal(m.tracker.pin([{ gfn: 5, nrFrames: 2 }]), OK, "what is pinned counts as done");
  m.unmap(...frames(0, 11));
  assert.equal(m.map(30), OK, "the unpin that it tries first makes room");
  assert.equal(m.tracker.pinned, 10);
  m.tracker.setQuota(INFINITY);
  assert.equal(m.map(...frames(100, 100)), OK);
});

test("parked by the operator: nothing is unpinned, and the guest's parks and activations change nothing", () => {
  const m = active({ quota: 3 });
  idle(m, 0, 1, 2);
  m.tracker.parkByOperator(true);
  m.tracker.park();
  m.tracker.unpark();
  for (let i = 0; i < 3; i++) m.pass();
  assert.deepEqual([m.held(0, 1, 2), m.map(3)], [[true, true, true], NOMEM]);
  m.activate();
  assert.deepEqual([m.tracker.parked, m.tracker.parkedByGuest], [true, false]);
  assert.deepEqual(unpinNow(m), { unpinned: 0, stayed: 3, slices: 1 });
  m.tracker.parkByOperator(false);
  assert.equal(m.tracker.parked, false);
  m.tracker.park();
  m.tracker.parkByOperator(false);
  assert.equal(m.tracker.parked, true, "the guest's parks are its own");
});

test("unpin now ignores A, never COUNT", () => {
  const m = active();
  idle(m, 5, 6);
  m.map(7);
  assert.equal(m.table.word(5), P + A);
  assert.deepEqual(unpinNow(m), { unpinned: 2, stayed: 1, slices: 1 });
  assert.deepEqual([m.held(5, 6, 7), m.table.word(5), m.table.word(7)], [[false, false, true], 0, P + 1]);
  assert.equal(m.map(5), OK, "what went is asked for again");
});

test("unpin now of a range leaves the rest alone", () => {
  const m = active();
  idle(m, ...frames(0, 10));
  assert.deepEqual(unpinNow(m, 3, 6), { unpinned: 3, stayed: 0, slices: 1 });
  assert.deepEqual(m.held(2, 3, 5, 6), [true, false, false, true]);
  assert.equal(m.table.word(2), P + A, "not even aged");
});

for (const [what, first, end, found] of [
  ["empty", 5, 5, []],
  ["that ends before it begins", 9, 3, []],
  ["beyond all memory", 2 ** 40, 2 ** 41, []],
  ["from far below to far above", -(2 ** 41), 2 ** 41, [5, 1023, 1024, 2047]],
  ["of all numbers", -INFINITY, INFINITY, [5, 1023, 1024, 2047]],
  ["small, across two leaves", 1000, 1030, [1023, 1024]],
  ["small, over the end of memory", 2040, 5000, [2047]],
] as const)
  test(`unpin now of a range ${what}`, () => {
    const m = active();
    idle(m, 5, 1023, 1024, 2047);
    assert.equal(unpinNow(m, first, end).unpinned, found.length);
    for (const gfn of [5, 1023, 1024, 2047])
      assert.deepEqual(m.held(gfn), [!(found as readonly number[]).includes(gfn)]);
  });

test("unpin now says which frames stayed: mapped, needed by a domain, and not claimed by the table in use", () => {
  const m = machine();
  m.tracker.hold({ first: 0, last: 0, gfn: 30 as Gfn, flags: 3 });
  m.activate(false);
  idle(m, ...frames(10, 10));
  m.map(12, 17);
  const { unpinned, stayed, next } = m.tracker.unpinIdle({ first: 0, end: INFINITY, from: 0 });
  assert.deepEqual([unpinned, [...stayed].sort(), next], [8, [12, 17, 30], null]);
  assert.deepEqual(m.tracker.unpinIdle({ first: 11, end: 13, from: 0 }).stayed, [12]);
});

test("a small range is looked up frame by frame, in slices, whatever is pinned elsewhere", () => {
  const m = active();
  idle(m, ...frames(0, 1500));
  m.map(700);
  assert.deepEqual(unpinNow(m, 100, 1000), { unpinned: 899, stayed: 1, slices: 4 });
  assert.deepEqual(m.held(99, 100, 700, 999, 1000), [true, false, true, false, true]);
});

test("what was discarded is unpinned, unless it is mapped, and asked for again", () => {
  const m = active();
  idle(m, ...frames(0, 600));
  m.map(7);
  for (const gfn of [40, 7, 599, 1000]) m.pinner.holes.add(addressOf(gfn));
  const stayed: number[] = [];
  let unpinned = 0;
  for (let from: number | null = 0; from !== null; ) {
    const range = { first: 0, end: INFINITY, from, discarded: true };
    const slice: ReturnType<typeof m.tracker.unpinIdle> = m.tracker.unpinIdle(range);
    unpinned += slice.unpinned;
    stayed.push(...slice.stayed);
    from = slice.next;
  }
  assert.deepEqual([unpinned, stayed], [2, [7]]);
  assert.deepEqual(m.held(39, 40, 41, 7, 599), [true, false, true, true, false]);
  assert.equal(m.table.word(39), P + A, "the others are not even aged");
  m.pinner.holes.delete(addressOf(40));
  assert.deepEqual([m.map(40), m.held(40)], [OK, [true]]);
});

test("when it cannot be found out what was discarded, the caller hears so and nothing is changed", () => {
  const m = active();
  idle(m, 1);
  m.pinner.discarded = () => {
    throw new HostError("mincore", "EAGAIN");
  };
  assert.throws(() => m.tracker.unpinIdle({ first: 0, end: 9, from: 0, discarded: true }), HostError);
  assert.deepEqual([m.held(1), m.table.word(1)], [[true], P + A]);
});

test("unpin now goes on in slices, and requests are served between them", () => {
  const m = active();
  idle(m, ...frames(0, 600));
  let next = 700;
  assert.deepEqual(
    unpinNow(m, 0, INFINITY, () => assert.equal(m.map(next++), OK)),
    {
      unpinned: 600,
      stayed: 0,
      slices: 3,
    },
  );
  assert.deepEqual(m.held(0, 599, 700, 701), [false, false, true, true]);
});

test("unpin now amid a pass takes nothing from the count of what is mapped", () => {
  const m = active();
  idle(m, ...frames(0, 300));
  m.map(...frames(400, 300));
  m.tracker.startPass();
  m.tracker.slice();
  unpinNow(m);
  while (m.tracker.slice());
  assert.equal(m.counters.framesMapped, 300);
});

test("a page that the host does not let go of stays, with its P", () => {
  const m = active();
  idle(m, 1, 3, 5);
  m.pinner.releasesMax = 1;
  assert.deepEqual(unpinNow(m), { unpinned: 1, stayed: 2, slices: 1 });
  assert.deepEqual([m.held(1, 3, 5), m.table.word(3)], [[false, true, true], P]);
});

test("without a table nothing is unpinned: devices of a guest that is frozen may still write", () => {
  const m = active();
  idle(m, 1);
  m.tracker.deactivate("pin-off");
  assert.deepEqual([unpinNow(m), m.held(1)], [{ unpinned: 0, stayed: 1, slices: 1 }, [true]]);
});

test("what observers see follows: life, parks and quota", () => {
  const m = machine({ quota: 100 });
  const seen = () => [
    LIVES[m.counters.life],
    m.counters.parks,
    m.counters.parkedByOperator,
    m.counters.quota,
  ];
  assert.deepEqual(seen(), ["undecided", 0, 0, 100]);
  m.activate();
  m.tracker.park();
  m.tracker.park();
  m.tracker.parkByOperator(true);
  assert.deepEqual(seen(), ["tracked", 2, 1, 100]);
  m.tracker.unpark();
  assert.deepEqual(seen(), ["tracked", 1, 1, 100]);
  m.tracker.deactivate("device-reset");
  assert.deepEqual(seen(), ["frozen", 0, 1, 100], "its parks have gone with its driver");
  m.tracker.machineReset();
  assert.deepEqual(seen(), ["undecided", 0, 1, 100]);
});
