import assert from "node:assert/strict";
import test from "node:test";
import fc from "fast-check";
import { fails, holds } from "../../test/support/property.ts";
import { InvariantViolation } from "./errors.ts";
import { FrameIndex, grown } from "./frame-index.ts";

/** GFNs that crowd: runs, multiples of large powers of two, and the same low 32 bits with other high ones. */
const crowded = fc.oneof(
  fc.nat(63),
  fc.nat(63).map((i) => i * 2 ** 16),
  fc.nat(63).map((i) => 2 ** 32 * (i + 1) + (i % 3)),
  fc.nat(63).map((i) => 2 ** 40 - 1 - i),
);

/** A phase in which the index fills, and then may be cleared or empties. */
const phase = fc.record({
  inserted: fc.array(crowded, { maxLength: 200, size: "max" }),
  removed: fc.array(crowded, { maxLength: 200, size: "max" }),
  cleared: fc.integer({ min: 0, max: 9 }).map((n) => n === 0),
});

const isMapOfStableIds = (create: () => FrameIndex) =>
  fc.property(fc.array(phase, { minLength: 1, maxLength: 6, size: "max" }), (phases) => {
    const frames = create();
    const model = new Map<number, number>();
    const agree = () => {
      for (const [gfn, id] of model) assert.equal(frames.find(gfn), id, `find of a held frame`);
      assert.equal(frames.size, model.size);
      assert.deepEqual(new Set(frames), new Set(model.keys()));
    };
    for (const { inserted, removed, cleared } of phases) {
      for (const gfn of inserted) {
        assert.equal(frames.find(gfn), model.get(gfn) ?? -1, "find");
        if (model.has(gfn)) continue;
        const id = frames.insert(gfn);
        assert.ok(id >= 0 && id < frames.capacity && frames.gfn(id) === gfn, "insert");
        assert.ok(![...model.values()].includes(id), "insert gave an id that is in use");
        model.set(gfn, id);
      }
      agree();
      for (const gfn of removed) {
        assert.equal(frames.remove(gfn), model.get(gfn) ?? -1, "remove");
        model.delete(gfn);
      }
      if (cleared) {
        frames.clear();
        model.clear();
      }
      agree();
    }
  });

holds(
  "a FrameIndex is a Map of stable ids",
  isMapOfStableIds(() => new FrameIndex()),
);

fails(
  "an index that forgets a frame whose low 32 bits are those of another",
  isMapOfStableIds(
    () =>
      new (class extends FrameIndex {
        override find(gfn: number): number {
          return super.find(gfn % 2 ** 32);
        }
      })(),
  ),
  /find/,
);

test("100,000 frames are found again, also after every second was removed", () => {
  const frames = new FrameIndex();
  const gfnOf = (i: number) => i * 4096 + (i % 2) * 2 ** 35;
  for (let i = 0; i < 100_000; i++) frames.insert(gfnOf(i));
  for (let i = 0; i < 100_000; i += 2) assert.ok(frames.remove(gfnOf(i)) >= 0);
  assert.equal(frames.size, 50_000);
  for (let i = 0; i < 100_000; i++) assert.equal(frames.find(gfnOf(i)) >= 0, i % 2 === 1);
  frames.clear();
  assert.deepEqual([frames.size, [...frames], frames.find(gfnOf(1))], [0, [], -1]);
  assert.equal(frames.gfn(frames.insert(7)), 7);
});

test("ids are reused, so that the arrays beside stay as long as the largest set", () => {
  const frames = new FrameIndex();
  for (let i = 0; i < 10_000; i++) {
    frames.insert(i);
    if (i >= 10) frames.remove(i - 10);
  }
  assert.equal(frames.capacity, 16);
});

test("frames may be removed while all are visited", () => {
  const frames = new FrameIndex();
  for (let i = 0; i < 100; i++) frames.insert(i);
  const seen: number[] = [];
  for (const gfn of frames) {
    seen.push(gfn);
    frames.remove(gfn);
    frames.remove(gfn + 1);
  }
  assert.deepEqual([seen.length, frames.size], [50, 0]);
});

test("a frame inserted twice is a bug of ours", () => {
  const frames = new FrameIndex();
  frames.insert(5);
  assert.throws(() => frames.insert(5), InvariantViolation);
});

test("grown keeps the contents and the type, and an array that is long enough", () => {
  const array = Float64Array.of(1, 2);
  assert.equal(grown(array, 2), array);
  assert.deepEqual(grown(array, 4), Float64Array.of(1, 2, 0, 0));
});
