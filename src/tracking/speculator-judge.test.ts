import assert from "node:assert/strict";
import test from "node:test";
import { active, idle, type Machine, machine } from "../../test/support/machine.ts";
import { random } from "../../test/support/random.ts";
import { account, guessing, passes, pinned, speculate } from "../../test/support/speculating.ts";
import type { Gfn } from "../base/units.ts";
import { createSpeculation } from "../policy/speculation/registry.ts";
import { TU_ACCESSED as A, TU_DIRTY as D, TU_PINNED as P, TU_WRITABLE as W } from "../wire/dtt.ts";
import { VIRTIO_IOMMU_S_OK as OK } from "../wire/virtio-iommu.ts";

// --- dirty tracking ------------------------------------------------------------------------------------------------

const harvest = (m: Machine): number[] => {
  const { ranges, more } = m.tracker.dirty.harvest(1000);
  assert.equal(more, false);
  const frames: number[] = [];
  for (let i = 0; i < ranges.length; i += 2)
    for (let j = 0; j < ranges[i + 1]!; j++) frames.push(ranges[i]! + j);
  return frames;
};

/** Frame 5 is mapped and 6 to 8 are pinned beside it; the driver maintains D and W. */
function harvested(): Machine {
  const m = machine(speculate("neighbours,budget=3"));
  m.activate(true, true);
  m.tracker.dirty.start();
  m.map(5);
  return m;
}

test("a harvest gives it when its unit says so, and not else: its driver tells of it as of all that it maps", () => {
  const m = harvested();
  assert.deepEqual(harvest(m), []);
  m.map(6, 7);
  m.table.set(6, P + A + W + 1);
  m.table.set(7, P + A + D);
  assert.deepEqual([harvest(m), harvest(m)], [[6, 7], [6]]);
});

test("used and written, then unpinned, it is given once more; unused it is not", () => {
  const m = harvested();
  m.table.set(7, P + A + D);
  passes(m, 2);
  assert.deepEqual([pinned(m), harvest(m), harvest(m)], [[5], [7], []]);
});

test("after PIN off nobody tells of it: every harvest gives it, and it is given once more when a new table claims it", () => {
  const m = harvested();
  m.tracker.deactivate("pin-off");
  assert.deepEqual(
    [harvest(m), harvest(m)],
    [
      [5, 6, 7, 8],
      [5, 6, 7, 8],
    ],
  );
  for (const gfn of [5, 6, 7, 8]) m.table.set(gfn, 0);
  m.activate(false, true);
  m.tracker.setSpeculation(createSpeculation("off"));
  m.map(6);
  assert.deepEqual(
    [harvest(m), harvest(m)],
    [
      [5, 6, 7, 8],
      [5, 7, 8],
    ],
  );
});

// --- the judge -----------------------------------------------------------------------------------------------------

/** Tells what it was told when it stopped. */
function judged(choice: string) {
  const told: (readonly [used: number, judged: number])[] = [];
  const m = active({ ...speculate(choice), speculationStopped: (...figures) => told.push(figures) });
  return { m, told };
}

/** A request whose two neighbours are used, or not. */
function request(m: Machine, gfn: number, used: boolean): void {
  m.map(gfn);
  if (used) idle(m, gfn + 1, gfn + 2);
  m.unmap(gfn);
  passes(m, 2);
}

test("speculation of which the guest uses less than half switches itself off, and says so once", () => {
  const { m, told } = judged("neighbours,budget=2,judged=8");
  for (const used of [true, true, true, false]) request(m, 100, used);
  assert.deepEqual([told, m.counters.speculationStopped], [[], 0], "6 of 8");
  for (let i = 0; i < 3; i++) request(m, 100, false);
  assert.deepEqual([told, m.counters.speculationStopped], [[[3, 8]], 1]);
  const [speculative] = account(m);
  for (let i = 0; i < 9; i++) request(m, 100, false);
  assert.deepEqual([told.length, account(m)[0]], [1, speculative], "nothing is pinned unasked any more");
});

test("with half of it used, it goes on", () => {
  const { m, told } = judged("neighbours,budget=2,judged=8");
  for (let i = 0; i < 20; i++) request(m, 100, i % 2 === 0);
  assert.deepEqual([told, m.counters.speculationStopped], [[], 0]);
});

for (const [what, again] of [
  ["an operator sets it", (m) => m.tracker.setSpeculation(m.tracker.speculation)],
  [
    "the machine is reset",
    (m) => {
      m.tracker.machineReset();
      m.activate();
    },
  ],
] as const satisfies readonly (readonly [string, (m: Machine) => void])[])
  test(`switched off, it is on again when ${what}, and is judged anew`, () => {
    const { m, told } = judged("neighbours,budget=2,judged=4");
    for (let i = 0; i < 2; i++) request(m, 100, false);
    assert.deepEqual([told.length, m.counters.speculationStopped], [1, 1]);
    again(m);
    request(m, 200, true);
    assert.deepEqual([m.counters.speculationStopped, m.counters.speculationUsed], [0, 2]);
    for (let i = 0; i < 2; i++) request(m, 200, false);
    assert.deepEqual([told.length, m.counters.speculationStopped], [2, 1]);
  });

// --- another one at run time ---------------------------------------------------------------------------------------

test("another speculation leaves what is pinned to the passes, and is not judged by it", () => {
  const { m, told } = judged("neighbours,budget=4,judged=4");
  m.map(5);
  m.tracker.setSpeculation(createSpeculation("stride,judged=4"));
  m.pass();
  assert.deepEqual([pinned(m), account(m), told], [[5], [4, 0, 4], []]);
});

test("whatever is chosen when, no pin is lost and none is left", () => {
  const next = random(0x5eed);
  const choices = ["off", "neighbours,budget=5", "ghost,budget=9", "stride,repeats=1", "neighbours,judged=8"];
  const m = active({ quota: 300 });
  const mapped: number[] = [];
  for (let i = 0; i < 3000; i++) {
    const gfn = next(600);
    if (next(40) === 0) m.tracker.setSpeculation(createSpeculation(choices[next(5)]!));
    else if (next(30) === 0) m.pass();
    else if (mapped.length > 20) m.unmap(mapped.splice(next(mapped.length), 1)[0]!);
    else if (m.map(gfn) === OK) mapped.push(gfn);
    else assert.fail("there is room for 21 frames");
    for (const frame of mapped) assert.deepEqual(m.held(frame), [true]);
    assert.equal(m.tracker.pinned, m.pinner.pages.size);
    assert.ok(m.tracker.pinned <= 300);
  }
  m.unmap(...mapped);
  passes(m, 2);
  const [speculative, saved, wasted] = account(m);
  assert.deepEqual([m.tracker.pinned, m.pinner.pages.size], [0, 0]);
  assert.equal(saved! + wasted!, speculative, "each was judged");
  assert.ok(saved! > 0 && wasted! > 0);
});

// --- who is told ---------------------------------------------------------------------------------------------------

test("policy and observers are told of it at once, and observers when it is used", () => {
  const told: string[] = [];
  const policy = active().tracker.policy;
  const tells = (who: string) => ({
    pinned: (gfn: Gfn, _now: number, unasked?: boolean) =>
      void told.push(`${who} pinned ${gfn}${unasked ? ", unasked" : ""}`),
    tried: (gfn: Gfn, outcome: string) => void told.push(`${who} ${outcome} ${gfn}`),
  });
  const m = guessing(1, {
    policy: { ...policy, ...tells("policy"), candidates: (_now, _limit, out) => out.push(6 as Gfn) },
    observers: [{ ...tells("observer"), used: (gfn) => void told.push(`observer used ${gfn}`) }],
  });
  m.map(5);
  m.map(6);
  m.tracker.startPass();
  m.tracker.slice();
  assert.deepEqual(told, [
    "policy pinned 5",
    "observer pinned 5",
    "policy pinned 6",
    "observer pinned 6, unasked",
    "observer used 6",
    "policy mapped 6",
    "observer mapped 6",
  ]);
});
