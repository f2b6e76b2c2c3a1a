/** Frames that are pinned together are one pin of the host's, and go one by one all the same. */
import assert from "node:assert/strict";
import test from "node:test";
import { addressOf, ramRegion } from "../../test/support/guest.ts";
import {
  active,
  idle,
  type Machine,
  type MachineOptions,
  machine,
  RAM_FRAMES,
} from "../../test/support/machine.ts";
import type { FakePinner } from "../../test/support/pinner.ts";
import { HostError } from "../base/errors.ts";
import { random } from "../base/random.ts";
import type { Gfn } from "../base/units.ts";
import { GfnBuffer } from "../policy/policy.ts";
import { TU_PINNED as P } from "../wire/dtt.ts";
import { VIRTIO_IOMMU_S_OK as OK } from "../wire/virtio-iommu.ts";
import { EXTENT_FRAMES } from "./extents.ts";
import { Pins } from "./pins.ts";

const frames = (first: number, count: number) => Array.from({ length: count }, (_, i) => first + i);
const mapping = (first: number, count = 1) =>
  ({ first, last: first + count - 1, gfn: first, access: 3 }) as never;

/** How many frames each pin of the host's has. */
const sizes = ({ pinner }: Pick<Machine, "pinner">): number[] => {
  const counts = new Map<number, number>();
  for (const [, handle] of pinner.handles()) counts.set(handle, (counts.get(handle) ?? 0) + 1);
  return [...counts.values()].sort((a, b) => b - a);
};
const singles = (count: number): number[] => Array.from({ length: count }, () => 1);

/** `held` are pinned at every moment in which the host is asked for something. */
const watch = (pinner: FakePinner, held: Iterable<number>, what = "") => {
  const { pin, release } = pinner;
  const check = () => {
    for (const gfn of held) assert.ok(pinner.isPinned(addressOf(gfn)), `${what}frame ${gfn} is not pinned`);
  };
  pinner.pin = (...args) => {
    pin.apply(pinner, args);
    check();
  };
  pinner.release = (...args) => {
    const released = release.apply(pinner, args);
    check();
    return released;
  };
};

/** A part of an extent that is idle goes; the rest is mapped. */
function splitting(count: number, options: MachineOptions = {}): Machine {
  const m = active(options);
  assert.equal(m.map(...frames(0, count)), OK);
  m.unmap(3);
  m.pass();
  return m;
}

/** The guest's balloon discards a frame when the split has looked, and is about to pin. */
function discardWhilePinning({ pinner }: Machine, gfn: number): void {
  pinner.before = (what) => {
    if (what === "pin") pinner.holes.add(addressOf(gfn));
    pinner.before = () => {};
  };
}

test("neighbours that are pinned together are one pin, of 32 frames at most", () => {
  const m = active();
  m.map(...frames(0, 70), 80, 82, 83);
  assert.deepEqual(sizes(m), [32, 32, 6, 2, 1]);
  m.unmap(...frames(0, 70), 80, 82, 83);
  m.pass();
  let calls = 0;
  m.pinner.before = () => calls++;
  m.pass();
  assert.deepEqual([m.tracker.pinned, m.pinner.pages.size, calls], [0, 0, 5], "each goes as a whole");
});

test("a part goes: the rest is pinned frame by frame, and was pinned at every moment", () => {
  const m = splitting(10);
  watch(m.pinner, [0, 1, 2, ...frames(4, 6)]);
  m.pass();
  assert.deepEqual([m.held(2, 3, 4), m.table.word(3), sizes(m)], [[true, false, true], 0, singles(9)]);
  assert.deepEqual([m.tracker.pinned, m.pinner.pages.size], [9, 9]);
});

test("broken twin: an extent that goes before its rest is pinned is caught", () => {
  const m = splitting(10);
  watch(m.pinner, [0, 1, 2, ...frames(4, 6)]);
  const { pin, release } = m.pinner;
  const [, extent] = [...m.pinner.handles()][0]!;
  m.pinner.pin = (...args) => {
    release.call(m.pinner, Int32Array.of(extent), 1);
    pin.apply(m.pinner, args);
  };
  assert.throws(() => m.pass(), /is not pinned/);
});

test("the host refuses the rest: nothing is changed, and a later pass tries again", () => {
  const m = splitting(10);
  m.pinner.pagesMax = 18;
  m.pass();
  assert.deepEqual([m.held(3), m.table.word(3), sizes(m), m.tracker.pinned], [[true], P, [10], 10]);
  m.pinner.pagesMax = 19;
  m.pass();
  assert.deepEqual([m.held(3), m.table.word(3), sizes(m)], [[false], 0, singles(9)]);
});

test("at a limit, what can go as a whole makes room for what is split", () => {
  const m = active();
  m.map(...frames(0, 10), ...frames(20, 9));
  m.unmap(3, ...frames(20, 9));
  m.pass();
  m.pinner.pagesMax = 19;
  m.pass();
  assert.deepEqual([m.tracker.pinned, sizes(m)], [9, singles(9)]);
});

test("the host does not release the extent: what it keeps is accounted, and it is split once", () => {
  const m = splitting(10);
  m.pinner.releasesMax = 0;
  for (let i = 0; i < 4; i++) m.pass();
  assert.deepEqual([m.held(3), m.table.word(3)], [[true], P]);
  assert.deepEqual([m.tracker.pinned, m.pinner.pages.size], [20, 20], "each frame has a pin of its own");
  m.pinner.releasesMax = Number.POSITIVE_INFINITY;
  m.pass();
  assert.deepEqual([m.held(3), m.tracker.pinned, sizes(m)], [[false], 9, singles(9)]);
});

test("what was discarded goes with the part, lately accessed or not, and gets no memory", () => {
  const m = splitting(10);
  m.unmap(5, 6);
  m.map(6);
  m.unmap(6);
  for (const gfn of [5, 6]) m.pinner.holes.add(addressOf(gfn));
  m.pass();
  assert.deepEqual([m.held(3, 5, 6), m.table.word(6)], [[false, false, false], 0]);
  assert.deepEqual([m.pinner.holes.size, sizes(m), m.counters.framesUnpinned], [2, singles(7), 3]);
});

test("broken twin: a split that pins where every page gets memory gives it to what is discarded meanwhile", () => {
  const region = ramRegion(0, RAM_FRAMES);
  const m = splitting(10, { regions: [{ ...region, presentAddress: region.hostAddress }] });
  discardWhilePinning(m, 5);
  m.pass();
  assert.deepEqual([m.held(3, 5), m.pinner.holes.size], [[false, true], 0]);
});

test("memory that has no second mapping is pinned frame by frame", () => {
  const m = splitting(10, { regions: [{ ...ramRegion(0, RAM_FRAMES), presentAddress: undefined }] });
  assert.deepEqual(sizes(m), singles(10));
  m.pass();
  assert.deepEqual([m.held(2, 3, 4), m.tracker.pinned], [[true, false, true], 9]);
});

test("an extent that was taken over by a host without second mappings goes as a whole only", () => {
  const dead = active();
  idle(dead, ...frames(0, 4));
  const m = machine({ regions: [{ ...ramRegion(0, RAM_FRAMES), presentAddress: undefined }] });
  m.pinner.inherit(dead.pinner);
  const [[, handle]] = [...dead.pinner.handles()] as [readonly [number, number]];
  m.tracker.adopt(frames(0, 4).map((gfn) => [gfn as Gfn, handle]));
  m.table.set(2, 1);
  m.activate();
  m.pass();
  assert.deepEqual([m.tracker.pinned, sizes(m)], [4, [4]]);
  m.table.set(2, 0);
  m.pass();
  assert.deepEqual([m.tracker.pinned, sizes(m)], [0, []]);
});

test("what was discarded and is mapped keeps its extent whole, until it has memory or is unmapped", () => {
  for (const end of ["memory", "unmapped"] as const) {
    const m = splitting(10);
    m.pinner.holes.add(addressOf(5));
    m.map(20);
    m.unmap(20);
    for (let i = 0; i < 2; i++) m.pass();
    assert.deepEqual([m.held(3, 5, 20), m.table.word(3), sizes(m)], [[true, true, false], P, [10]]);
    assert.ok(m.pinner.holes.has(addressOf(5)), "it was given no memory");
    if (end === "memory") m.pinner.holes.clear();
    else m.unmap(5);
    for (let i = 0; i < 2; i++) m.pass();
    assert.deepEqual(m.held(3, 5), [false, end === "memory"]);
  }
});

test("what is discarded while its extent is about to be split keeps it whole, for a pass", () => {
  const m = splitting(10);
  m.unmap(5);
  m.map(5);
  m.unmap(5);
  discardWhilePinning(m, 5);
  m.pass();
  assert.deepEqual([m.held(3, 5), m.table.word(3), sizes(m)], [[true, true], P, [10]]);
  m.pass();
  assert.deepEqual([m.held(3, 5), m.pinner.holes.size, sizes(m)], [[false, false], 1, singles(8)]);
});

test("a force-unpin of what was discarded finds all of an extent, however it is sliced", () => {
  const m = active();
  idle(m, ...frames(1, 600));
  // Slices end after 256 slots of the ledger, in the midst of an extent of 32.
  idle(m, 0);
  const lost = [...frames(240, 40), 599];
  for (const gfn of lost) m.pinner.holes.add(addressOf(gfn));
  for (const first of [0, 250]) {
    const range = { first, end: first === 0 ? Number.POSITIVE_INFINITY : 260, discarded: true };
    for (let from: number | null = 0; from !== null; ) from = m.tracker.unpinIdle({ ...range, from }).next;
  }
  assert.ok(m.held(...lost).every((held) => !held));
  assert.deepEqual([m.tracker.pinned, m.pinner.holes.size], [601 - lost.length, lost.length]);
});

test("it cannot be found out what was discarded: the extent is split if nothing was", () => {
  const m = splitting(10);
  m.pinner.holes.add(addressOf(5));
  m.pinner.discarded = () => {
    throw new HostError("mincore", "EAGAIN");
  };
  m.pass();
  assert.deepEqual([m.held(3), m.table.word(3), sizes(m)], [[true], P, [10]]);
  m.pinner.holes.clear();
  m.pass();
  assert.deepEqual([m.held(3), sizes(m)], [[false], singles(9)]);
});

test("frames that leave a domain, or the memory map, leave their extents", () => {
  const m = machine();
  assert.equal(m.tracker.hold(mapping(0, 8)), OK);
  assert.equal(m.tracker.hold(mapping(2, 2)), OK);
  assert.deepEqual(sizes(m), [8]);
  m.tracker.letGo([mapping(0, 8)]);
  assert.deepEqual([m.tracker.pinned, sizes(m), m.held(1, 2, 3, 4)], [2, [1, 1], [false, true, true, false]]);
});

test("what a domain lets go of waits, accounted, while the rest of its extent has lost its memory", () => {
  const m = machine();
  assert.equal(m.tracker.hold(mapping(0, 8)), OK);
  assert.equal(m.tracker.hold(mapping(2, 2)), OK);
  m.pinner.holes.add(addressOf(2));
  m.tracker.letGo([mapping(0, 8)]);
  assert.deepEqual([m.tracker.pinned, sizes(m), m.pinner.holes.size], [8, [8], 1]);
  assert.equal(m.gate.allows(1 as Gfn), false);
  m.tracker.letGo([mapping(2, 2)]);
  assert.deepEqual([m.tracker.pinned, sizes(m)], [0, []]);
});

test("pinned again while its extent still keeps its page: both are accounted, and each goes for itself", () => {
  const m = machine();
  assert.equal(m.tracker.hold(mapping(0, 8)), OK);
  assert.equal(m.tracker.hold(mapping(2, 2)), OK);
  m.pinner.holes.add(addressOf(2));
  m.tracker.letGo([mapping(0, 8)]);
  assert.equal(m.tracker.hold(mapping(4)), OK);
  assert.deepEqual([m.tracker.pinned, sizes(m)], [9, [8, 1]]);
  m.pinner.holes.clear();
  m.pass();
  assert.deepEqual(
    [m.tracker.pinned, sizes(m), m.held(2, 3, 4, 5)],
    [3, [1, 1, 1], [true, true, true, false]],
  );
});

test("a backend that takes over extents goes on with them, also where one was being split", () => {
  const dead = active();
  dead.map(...frames(0, 5));
  dead.pinner.pin(Float64Array.of(addressOf(1)), 1, new Int32Array(1));
  const m = machine();
  m.pinner.inherit(dead.pinner);
  const gfnAt = (address: number) => ((address - addressOf(0)) / 4096) as Gfn;
  m.tracker.adopt([...dead.pinner.handles()].map(([address, handle]) => [gfnAt(address), handle]));
  assert.equal(m.tracker.pinned, 6);
  m.table.set(1, 1);
  m.activate();
  m.pass();
  assert.deepEqual([m.held(0, 1, 2), m.tracker.pinned, sizes(m)], [[false, true, false], 1, [1]]);
});

test("whatever goes, in whatever order, with a host that refuses: what stays is pinned at every moment", () => {
  for (let seed = 1; seed <= 20; seed++) {
    const next = random(seed);
    const m = machine();
    const { pinner } = m;
    const iommu = { allow: () => {}, revoke: () => {}, quiesce: () => true } as never;
    const policy = { pinned: () => {}, tried: () => {} } as never;
    const pins = new Pins({ memory: m.memory, pinner, iommu, policy, clock: { now: () => 0 as never } });
    const held = new Set<number>();
    watch(pinner, held, `seed ${seed}: `);
    for (let round = 0; round < 30; round++) {
      pinner.pagesMax = next(3) === 0 ? pinner.pages.size + next(40) : Number.POSITIVE_INFINITY;
      pinner.releasesMax = next(3) === 0 ? next(4) : Number.POSITIVE_INFINITY;
      const fresh = frames(next(100), 1 + next(2 * EXTENT_FRAMES)).filter(
        (gfn) => !pins.ledger.has(gfn as Gfn),
      );
      try {
        pins.pin(fresh as Gfn[], 1);
        for (const gfn of fresh) held.add(gfn);
      } catch {} // refused; the accounts below say whether nothing was pinned
      const going = [...held].filter(() => next(3) === 0);
      for (const gfn of going) held.delete(gfn);
      if (next(4) === 0) pins.drop(going as Gfn[]);
      else {
        const list = new GfnBuffer(200);
        for (const gfn of going) list.push(gfn as Gfn);
        const unpinned = pins.unpin(list, 0 as never);
        assert.equal(unpinned + list.length, going.length);
        for (let i = 0; i < list.length; i++) held.add(list.at(i));
      }
      assert.equal(pins.size, pinner.pages.size);
      assert.deepEqual(new Set(pins.ledger.frames()), new Set(held));
    }
    pinner.releasesMax = pinner.pagesMax = Number.POSITIVE_INFINITY;
    held.clear();
    pins.drop([...pins.ledger.frames()]);
    pins.releaseOrphans();
    assert.deepEqual([pins.size, pinner.pages.size], [0, 0]);
  }
});
