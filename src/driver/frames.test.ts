import assert from "node:assert/strict";
import test from "node:test";
import { TestPages } from "../../test/support/dma.ts";
import { ram } from "../../test/support/guest.ts";
import { random } from "../../test/support/random.ts";
import type { Gpa } from "../base/units.ts";
import { FrameCache } from "./frames.ts";

const setUp = (frames: number, framesMax: number) => {
  const pages = new TestPages(ram(frames), 0, frames);
  return { pages, cache: new FrameCache(pages, framesMax, random(1)) };
};

test("no frame is handed out twice at once, the bound holds, and all are freed", () => {
  const { pages, cache } = setUp(256, 128);
  const next = random(2);
  const held: Gpa[] = [];
  for (let i = 0; i < 5000; i++) {
    if (next(2) === 0) {
      const taken = cache.take(1 + next(8));
      assert.ok(taken || held.length > 120);
      held.push(...(taken ?? []));
    } else cache.give(held.splice(0, next(8)));
    assert.equal(new Set(held).size, held.length);
    assert.ok(pages.used <= 128);
  }
  cache.give(held);
  cache.close();
  assert.equal(pages.used, 0);
});

test("a request that cannot be met takes nothing", () => {
  const { pages, cache } = setUp(16, 100);
  assert.equal(cache.take(17), undefined);
  assert.equal(cache.take(16)?.length, 16);
  assert.equal(pages.used, 16);
});

test("most frames were used a short time ago, and all are used in time", () => {
  const { cache } = setUp(1024, 1024);
  const lastUse = new Map<Gpa, number>();
  let soon = 0;
  for (let i = 0; i < 20_000; i++) {
    const [frame] = cache.take(1)!;
    if (i - (lastUse.get(frame!) ?? Number.NEGATIVE_INFINITY) < 256) soon++;
    lastUse.set(frame!, i);
    cache.give([frame!]);
  }
  assert.ok(soon > 10_000 && soon < 19_000, `${soon}`);
  assert.ok(lastUse.size > 1000, `${lastUse.size}`);
});
