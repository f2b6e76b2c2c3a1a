/** A host that maps each page once: what is pinned as one, and how mappings suffice. */
import assert from "node:assert/strict";
import test from "node:test";
import { HOST_BASE, ramRegion } from "../../test/support/guest.ts";
import { behindIommu, blocksAlone, frames, passes, runs, untouched } from "../../test/support/iommu-guest.ts";
import { idle, type Machine, RAM_FRAMES } from "../../test/support/machine.ts";
import type { FakeIommuPinner } from "../../test/support/pinner.ts";
import type { HostError } from "../base/errors.ts";
import { random } from "../base/random.ts";
import type { Gfn } from "../base/units.ts";
import { TU_PINNED as P } from "../wire/dtt.ts";
import { VIRTIO_IOMMU_S_NOMEM as NOMEM, VIRTIO_IOMMU_S_OK as OK } from "../wire/virtio-iommu.ts";
import { BLOCK_FRAMES } from "./block.ts";

test("neighbours that are pinned together are one mapping, up to the next 2 MiB", () => {
  const m = behindIommu();
  assert.equal(m.map(...frames(500, 600), 1200, 1202), OK);
  assert.deepEqual(runs(m), [
    [500, 12],
    [512, 512],
    [1024, 76],
    [1200, 1],
    [1202, 1],
  ]);
});

test("a mapping grows into a block that is mostly in use: one frame after the other takes few mappings", () => {
  const m = behindIommu();
  for (const gfn of frames(0, BLOCK_FRAMES)) assert.equal(m.map(gfn), OK);
  assert.deepEqual(
    runs(m).map(([, length]) => length),
    [1, 1, 2, 4, 8, 16, 32, 64, 128, 256],
  );
  assert.deepEqual([m.tracker.pinned, m.counters.framesNow], [BLOCK_FRAMES, BLOCK_FRAMES]);
});

test("frames in no order end in fewer mappings than frames", () => {
  const m = behindIommu();
  const below = random(7);
  const order = frames(0, BLOCK_FRAMES);
  for (let i = order.length - 1; i > 0; i--) {
    const j = below(i + 1);
    [order[i], order[j]] = [order[j]!, order[i]!];
  }
  for (const gfn of order) assert.equal(m.map(gfn), OK);
  assert.ok(m.pinner.mappings.size < 0.75 * BLOCK_FRAMES, `${m.pinner.mappings.size} mappings`);
  assert.equal(m.tracker.pinned, BLOCK_FRAMES);
});

test("what grows takes no frame along that has no memory", () => {
  const m = behindIommu();
  untouched(m);
  for (const gfn of frames(0, 64)) m.map(gfn);
  assert.deepEqual([m.tracker.pinned, m.pinner.mappings.size], [64, 64]);
});

test("what grows stays within the region, and takes no frame of another region's memory", () => {
  const [low, high] = [ramRegion(0, 6), ramRegion(6 * 4096, RAM_FRAMES - 6, HOST_BASE + 2 ** 40)];
  const m = behindIommu({ regions: [low, high] });
  m.map(0, 1, 2, 3);
  m.map(4);
  assert.deepEqual(runs(m), [
    [0, 4],
    [4, 2],
  ]);
  m.map(...frames(4, 4));
  assert.deepEqual(
    runs(m).map(([first]) => first),
    [0, 4, 6],
  );
});

test("pages that nobody needs count against the quota, and grow within half of what it leaves", () => {
  const m = behindIommu({ quota: 12 });
  m.map(0, 1, 2, 3);
  m.map(4);
  assert.deepEqual(
    runs(m),
    [
      [0, 4],
      [4, 4],
    ],
    "3 of 7 frames",
  );
  m.map(8);
  assert.deepEqual([runs(m)[2], m.tracker.pinned], [[8, 1], 9], "7 more are too many");
  assert.equal(m.map(...frames(20, 4)), NOMEM);
  assert.equal(m.map(...frames(5, 3)), OK);
});

test("a mapping that would grow beyond half of what the quota leaves does not grow", () => {
  const growth = (quota: number) => {
    const m = behindIommu({ quota });
    m.map(...frames(0, 8));
    m.map(8);
    return runs(m)[1];
  };
  assert.deepEqual(
    [growth(8 + 1 + 14), growth(8 + 1 + 13)],
    [
      [8, 8],
      [8, 1],
    ],
  );
});

test("frames that come together, with nobody hot beside them, take no others along", () => {
  const m = behindIommu();
  m.map(100);
  m.map(...frames(0, 10));
  assert.deepEqual(runs(m), [
    [0, 10],
    [100, 1],
  ]);
});

test("with more than half of the mappings taken, the others are made to suffice for all that is left", () => {
  const m = behindIommu();
  untouched(m);
  m.pinner.pinsMax = 64;
  let beyond = 0;
  for (let gfn = 0; gfn < 1536; gfn++) {
    assert.equal(m.map(gfn), OK, `frame ${gfn}, with ${m.pinner.mappings.size} mappings`);
    beyond = Math.max(beyond, m.tracker.pinned - gfn - 1);
  }
  assert.deepEqual(m.counters.pinRequestsRefused, 0);
  assert.ok(beyond < 64, `${beyond} frames beyond need`);
});

test("where mappings are scarce, frames of one request that are near each other share one", () => {
  const m = behindIommu();
  m.pinner.pinsMax = 16;
  untouched(m);
  m.map(...frames(0, 8).map((i) => 512 + 16 * i));
  const before = m.pinner.mappings.size;
  assert.equal(m.map(...frames(0, 64).map((i) => 1024 + 2 * i)), OK);
  assert.deepEqual([before, m.pinner.mappings.size, runs(m).at(-1)], [8, 9, [1024, 256]]);
});

test("with no mapping left all that is idle goes, and then the guest is refused with NOMEM, and the operator told why", () => {
  const told: HostError[] = [];
  const m = behindIommu({ refused: (error) => told.push(error) });
  m.pinner.pinsMax = 4;
  untouched(m);
  idle(m, 0);
  m.map(512, 600, 1024);
  assert.equal(m.map(700), OK, "frame 0 has gone");
  assert.equal(m.pinner.maps(0), false);
  assert.deepEqual(told, []);
  const before = m.tracker.pinned;
  assert.equal(m.map(5), NOMEM);
  assert.deepEqual(
    [told.map(({ errno }) => errno), m.tracker.pinned, m.table.word(5) & P],
    [["ENOSPC"], before, 0],
  );
  m.unmap(512);
  assert.equal(m.map(5), OK);
});

test("frames that no handle can number are refused, the last below them are not", () => {
  const last = 2 ** 31 - BLOCK_FRAMES - 1;
  const { blocks, pinner } = blocksAlone(last, 2);
  blocks.pin([last as Gfn], () => {});
  assert.throws(() => blocks.pin([(last + 1) as Gfn], () => {}), { errno: "EINVAL" });
  assert.deepEqual([...pinner.mappings.values()], [[last]]);
});

test("where what it would grow by cannot be pinned, it does not grow", () => {
  const m = behindIommu();
  m.map(0, 1, 2, 3);
  m.pinner.pagesMax = 5;
  assert.equal(m.map(4), OK);
  assert.deepEqual(
    [runs(m), m.tracker.pinned],
    [
      [
        [0, 4],
        [4, 1],
      ],
      5,
    ],
  );
});

/** Random maps, unmaps and passes; what the guest has mapped must be reachable at every moment. */
function play(seed: number, steps: number, m: Machine<FakeIommuPinner>): void {
  const below = random(seed);
  const live = new Map<number, number>();
  const check = (what: string) => {
    for (const gfn of live.keys())
      assert.ok(m.pinner.maps(gfn), `${what}: frame ${gfn} is mapped by the guest`);
  };
  m.pinner.before = (what) => check(what);
  for (let step = 0; step < steps; step++) {
    const first = below(4) === 0 ? below(1000) : 300 + below(64);
    const wanted = frames(first, 1 + below(below(3) === 0 ? 40 : 2));
    if (below(2) === 0) {
      if (m.map(...wanted) === OK) for (const gfn of wanted) live.set(gfn, (live.get(gfn) ?? 0) + 1);
      else m.unmap(...wanted);
    } else
      for (const gfn of [...live.keys()].slice(below(live.size + 1)).slice(0, 60)) {
        m.unmap(gfn);
        if (live.get(gfn) === 1) live.delete(gfn);
        else live.set(gfn, live.get(gfn)! - 1);
      }
    if (below(8) === 0) m.pass();
    check("after a step");
    const pages = [...m.pinner.mappings.values()].reduce((sum, of) => sum + of.length, 0);
    assert.deepEqual([m.tracker.pinned, m.pinner.pages.size], [pages, pages]);
    for (const gfn of m.tracker.frames()) assert.ok(m.pinner.maps(gfn), `frame ${gfn} is in the ledger`);
  }
  for (const [gfn, count] of live) for (let i = 0; i < count; i++) m.unmap(gfn);
  live.clear();
  passes(m);
  assert.deepEqual([m.tracker.pinned, m.pinner.mappings.size], [0, 0]);
}

test("whatever a guest maps, in any order, stays mapped as long as it needs it", () => {
  for (let seed = 1; seed <= 20; seed++) {
    const m = behindIommu(seed % 2 ? {} : { quota: 300 });
    if (seed % 3 === 0) untouched(m);
    if (seed % 4 === 0) m.pinner.pinsMax = 48;
    play(seed, 400, m);
  }
});

test("broken twin: a mapping that goes with its first idle frame is caught", () => {
  const m = behindIommu();
  const { tracker, pinner } = m;
  const { slice } = tracker;
  tracker.slice = () => {
    const before = m.counters.framesUnpinned;
    const more = slice.call(tracker);
    const [handle] = pinner.mappings.keys();
    if (m.counters.framesUnpinned > before && handle !== undefined) pinner.release(Int32Array.of(handle), 1);
    return more;
  };
  assert.throws(() => play(1, 400, m), /is mapped by the guest/);
});
