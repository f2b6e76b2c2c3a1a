/** A host that maps each page once: what is pinned as one goes as one, and mappings are few. */
import assert from "node:assert/strict";
import test from "node:test";
import { addressOf, HOST_BASE, ramRegion } from "../../test/support/guest.ts";
import { active, idle, type Machine, type MachineOptions, RAM_FRAMES } from "../../test/support/machine.ts";
import { FakeIommuPinner } from "../../test/support/pinner.ts";
import type { HostError } from "../base/errors.ts";
import { random } from "../base/random.ts";
import type { Gfn, Gpa } from "../base/units.ts";
import { GuestMemory } from "../memory/guest-memory.ts";
import { TU_PINNED as P } from "../wire/dtt.ts";
import {
  VIRTIO_IOMMU_S_IOERR as IOERR,
  VIRTIO_IOMMU_S_NOMEM as NOMEM,
  VIRTIO_IOMMU_S_OK as OK,
} from "../wire/virtio-iommu.ts";
import { BLOCK_FRAMES } from "./block.ts";
import { Blocks } from "./blocks.ts";
import { Ledger } from "./ledger.ts";

const INFINITY = Number.POSITIVE_INFINITY;
const frames = (first: number, count: number) => Array.from({ length: count }, (_, i) => first + i);

const behindIommu = (options: MachineOptions = {}): Machine<FakeIommuPinner> =>
  active({ ...options, pinner: new FakeIommuPinner() });

/** First frame and length of each mapping, ascending. */
const runs = ({ pinner }: Machine<FakeIommuPinner>) =>
  [...pinner.mappings.values()]
    .map((gfns) => [Math.min(...gfns), gfns.length] as const)
    .sort(([a], [b]) => a - b);

const passes = (m: Machine<FakeIommuPinner>, count = 2) => {
  for (let i = 0; i < count; i++) m.pass();
};

/** Force-unpin, slice by slice. */
function unpinNow(m: Machine<FakeIommuPinner>, first = 0, end = INFINITY, discarded = false) {
  const stayed: Gfn[] = [];
  for (let from: number | null = 0; from !== null; ) {
    const slice: ReturnType<typeof m.tracker.unpinIdle> = m.tracker.unpinIdle({
      first,
      end,
      from,
      discarded,
    });
    stayed.push(...slice.stayed);
    from = slice.next;
  }
  return stayed;
}

/** No frame has memory that the guest has not used. */
const untouched = (m: Machine<FakeIommuPinner>) => {
  for (let gfn = 0; gfn < RAM_FRAMES; gfn++) m.pinner.holes.add(addressOf(gfn));
};

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

test("a mapping goes when all of its frames are idle, and not before", () => {
  const m = behindIommu();
  m.map(...frames(0, 10));
  m.unmap(...frames(0, 9));
  passes(m);
  assert.deepEqual([m.table.word(0), m.gate.allows(0 as Gfn), m.tracker.pinned], [0, false, 10]);
  assert.ok(m.gate.allows(9 as Gfn) && m.pinner.maps(9) && m.table.word(9) & P);
  assert.deepEqual(runs(m), [[0, 10]]);
  m.unmap(9);
  passes(m);
  assert.deepEqual([runs(m), m.tracker.pinned, m.pinner.pages.size], [[], 0, 0]);
});

test("idle mappings go with one call over the holes between them, not over a mapping in use, nor over what is no RAM", () => {
  const [low, high] = [ramRegion(0, 250), ramRegion(256 * 4096, RAM_FRAMES - 256)];
  const m = behindIommu({ regions: [low, high] });
  for (const gfn of [257, 20, 16, 14, 12, 249, 10]) m.map(gfn);
  m.unmap(10, 12, 16, 20, 249, 257);
  passes(m);
  assert.deepEqual([runs(m), m.pinner.unmaps], [[[14, 1]], 3]);
});

test("a frame that is pinned again takes its page over without a word to the host", () => {
  const m = behindIommu({ quota: 10 });
  m.map(...frames(0, 10));
  m.unmap(...frames(1, 9));
  passes(m);
  m.pinner.before = () => assert.fail("the host is asked");
  assert.equal(m.map(4), OK, "though the quota has no room");
  assert.deepEqual([m.gate.allows(4 as Gfn), m.gate.allows(5 as Gfn), m.tracker.pinned], [true, false, 10]);
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
  passes(m);
  m.pinner.holes.add(addressOf(3));
  assert.deepEqual([m.map(3), m.map(1)], [IOERR, OK]);
});

test("a frame with other memory than its mapping is refused, as long as that is in use", () => {
  const whole = ramRegion(0, RAM_FRAMES);
  const m = behindIommu({ regions: [whole] });
  m.map(...frames(0, 4));
  m.unmap(2);
  passes(m);
  const part = (first: number, end: number) => ({
    ...{ gpa: (first * 4096) as Gpa, size: (end - first) * 4096, hostAddress: addressOf(first) },
    bytes: whole.bytes.subarray(first * 4096, end * 4096),
  });
  m.tracker.setMemory([part(0, 2), ramRegion(2 * 4096, 1, HOST_BASE + 2 ** 40), part(3, RAM_FRAMES)]);
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

test("frames that no handle can number are refused, the last below them are not", () => {
  const last = 2 ** 31 - BLOCK_FRAMES - 1;
  const region = { ...ramRegion(0, 2), gpa: (last * 4096) as Gpa };
  const pinner = new FakeIommuPinner();
  const ledger = new Ledger();
  const memory = new GuestMemory([region]);
  const blocks = new Blocks({ memory, pinner, ledger, room: () => INFINITY, mayPin: () => true });
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
