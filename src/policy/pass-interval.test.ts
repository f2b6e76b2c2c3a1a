import assert from "node:assert/strict";
import test from "node:test";
import { type Gfn, milliseconds } from "../base/units.ts";
import { PassInterval } from "./pass-interval.ts";

const frames = (first: number, count: number) => Array.from({ length: count }, (_, i) => (first + i) as Gfn);
const bounds = { min: milliseconds(100), max: milliseconds(4000) };
const ms = (interval: PassInterval) => Math.round(interval.now / 1e6);

/** A pass at `at` ms that tries 100 frames, of which `unpinned` go. */
function pass(interval: PassInterval, at: number, unpinned: number, took = 0): void {
  for (const gfn of frames(0, 100))
    interval.tried(gfn, gfn < unpinned ? "claimed" : "accessed", milliseconds(at));
  interval.passEnded(milliseconds(at), took);
}

/** Frames that were unpinned are asked for again, one in each request. */
function comeBack(interval: PassInterval, from: number, count: number): void {
  for (const gfn of frames(0, count)) interval.pinned(gfn, milliseconds(from + 0.1 * gfn));
}

test("a fixed interval stays what it is", () => {
  const interval = new PassInterval(milliseconds(300));
  for (let i = 0; i < 10; i++) pass(interval, 300 * i, 100);
  assert.equal(interval.now, milliseconds(300));
});

test("an adaptive one begins at 300 ms, shortens while passes find much, and not below its least", () => {
  const interval = new PassInterval(bounds);
  assert.equal(ms(interval), 300);
  pass(interval, 0, 50);
  assert.ok(ms(interval) < 300);
  for (let i = 1; i < 20; i++) pass(interval, 100 * i, 50);
  assert.equal(interval.now, bounds.min);
});

test("it lengthens while frames that come back soon make too many requests, and not above its most", () => {
  const interval = new PassInterval(bounds);
  for (let i = 0; i < 20; i++) {
    pass(interval, 1000 * i, 80);
    comeBack(interval, 1000 * i + 50, 80);
  }
  assert.equal(interval.now, bounds.max);
  assert.equal(interval.cameBack, 20 * 80);
});

test("frames that come back in few requests are no reason to lengthen: they cost few exits", () => {
  const interval = new PassInterval(bounds);
  for (let i = 0; i < 20; i++) {
    pass(interval, 1000 * i, 80);
    for (const gfn of frames(0, 80)) interval.pinned(gfn, milliseconds(1000 * i + 50));
  }
  assert.deepEqual([interval.now, interval.cameBack], [bounds.min, 20 * 80]);
});

test("frames that come back late are no reason to lengthen", () => {
  const interval = new PassInterval(bounds);
  pass(interval, 0, 50);
  const before = interval.now;
  comeBack(interval, 60_000, 50);
  pass(interval, 60_010, 0);
  assert.ok(interval.now <= 1.02 * before);
  assert.equal(interval.cameBack, 0);
});

test("between the two it stays: little was found, or as many came back as may", () => {
  const interval = new PassInterval(bounds);
  for (let i = 0; i < 10; i++) pass(interval, i, 5);
  assert.equal(ms(interval), 300);
  pass(interval, 1000, 0);
  for (let i = 1; i < 10; i++) {
    for (const gfn of frames(0, 40)) interval.tried(gfn, "claimed", milliseconds(1000 * i));
    comeBack(interval, 1000 * i + 50, 15);
    interval.passEnded(milliseconds(1000 * i + 1000), 0);
  }
  assert.equal(ms(interval), 300);
});

test("passes that take more than a tenth of the backend's time lengthen it", () => {
  const interval = new PassInterval(bounds);
  pass(interval, 0, 50, milliseconds(31));
  assert.equal(ms(interval), 450);
  pass(interval, 2000, 5, milliseconds(31));
  assert.equal(ms(interval), 450);
});

test("while passes find little, a short one goes back to where it began by and by, and a long one stays", () => {
  const interval = new PassInterval(bounds);
  for (let i = 0; i < 20; i++) pass(interval, 100 * i, 50);
  const times = Array.from({ length: 150 }, (_, i) => {
    pass(interval, 10_000 + 1000 * i, 0);
    return ms(interval);
  });
  assert.deepEqual([times[0], times[1], times.at(-1)], [102, 104, 300]);
  const long = new PassInterval(milliseconds(3000));
  long.choose(bounds);
  pass(long, 0, 0);
  assert.equal(ms(long), 3000);
});

test("new bounds hold at once, and an adaptive one goes on from where a fixed one was", () => {
  const interval = new PassInterval(milliseconds(8000));
  interval.choose(bounds);
  assert.equal(interval.now, bounds.max);
  interval.choose(milliseconds(50));
  interval.choose(bounds);
  assert.equal(interval.now, bounds.min);
});

test("frames that are pinned unasked, and used then, have come back without a request: that is no price", () => {
  const interval = new PassInterval(bounds);
  for (let i = 0; i < 20; i++) {
    pass(interval, 1000 * i, 80);
    for (const gfn of frames(0, 80)) {
      interval.pinned(gfn, milliseconds(1000 * i + 50), true);
      if (gfn % 2 === 0) interval.used(gfn);
    }
  }
  assert.deepEqual([interval.now, interval.cameBack], [bounds.min, 0]);
});
