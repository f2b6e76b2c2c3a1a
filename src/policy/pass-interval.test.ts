import assert from "node:assert/strict";
import test from "node:test";
import { type Gfn, milliseconds } from "../base/units.ts";
import { PassInterval } from "./pass-interval.ts";

const frames = (first: number, count: number) => Array.from({ length: count }, (_, i) => (first + i) as Gfn);
const bounds = { min: milliseconds(100), max: milliseconds(4000) };

/** A pass at `ms` that tries 100 frames, of which `unpinned` go. */
function pass(interval: PassInterval, ms: number, unpinned: number): void {
  for (const gfn of frames(0, 100))
    interval.tried(gfn, gfn < unpinned ? "claimed" : "accessed", milliseconds(ms));
  interval.passEnded();
}

test("a fixed interval stays what it is", () => {
  const interval = new PassInterval(milliseconds(300));
  for (let i = 0; i < 10; i++) pass(interval, 300 * i, 100);
  assert.equal(interval.now, milliseconds(300));
});

test("an adaptive one begins at a second, shortens while passes find much, and not below its least", () => {
  const interval = new PassInterval(bounds);
  assert.equal(interval.now, milliseconds(1000));
  pass(interval, 0, 50);
  assert.ok(interval.now < milliseconds(1000));
  for (let i = 0; i < 20; i++) pass(interval, i, 50);
  assert.equal(interval.now, bounds.min);
});

test("it lengthens when frames come back soon, and not above its most", () => {
  const interval = new PassInterval(bounds);
  for (let i = 0; i < 20; i++) {
    const ms = 10_000 * i;
    pass(interval, ms, 50);
    for (const gfn of frames(0, 50)) interval.pinned(gfn, milliseconds(ms + 50));
    pass(interval, ms + 100, 0);
  }
  assert.equal(interval.cameBack, 20 * 50);
  assert.equal(Math.round(interval.now / 1e6), 1000, "what one pass gained, the next one gave back");
  for (const gfn of frames(0, 50)) interval.tried(gfn, "claimed", milliseconds(300_000));
  for (let i = 0; i < 20; i++) {
    for (const gfn of frames(0, 50)) interval.pinned(gfn, milliseconds(300_050 + 100 * i));
    pass(interval, 300_100 + 100 * i, 50);
  }
  assert.equal(interval.now, bounds.max);
});

test("frames that come back late are no reason to lengthen", () => {
  const interval = new PassInterval(bounds);
  pass(interval, 0, 50);
  const before = interval.now;
  for (const gfn of frames(0, 50)) interval.pinned(gfn, milliseconds(60_000));
  interval.passEnded();
  assert.deepEqual([interval.now, interval.cameBack], [before, 0]);
});

test("between the two it stays: little was found, and little came back", () => {
  const interval = new PassInterval(bounds);
  for (let i = 0; i < 10; i++) pass(interval, i, 5);
  assert.equal(interval.now, milliseconds(1000));
});

test("new bounds hold at once, and an adaptive one goes on from where a fixed one was", () => {
  const interval = new PassInterval(milliseconds(8000));
  interval.choose(bounds);
  assert.equal(interval.now, bounds.max);
  interval.choose(milliseconds(50));
  interval.choose(bounds);
  assert.equal(interval.now, bounds.min);
});
