import assert from "node:assert/strict";
import test from "node:test";
import { random } from "../../test/support/random.ts";
import { InvariantViolation } from "./errors.ts";
import { FrameIndex, grown } from "./frame-index.ts";

/** What FrameIndex must do, at its simplest. */
interface Frames {
  readonly size: number;
  readonly capacity: number;
  find(gfn: number): number;
  insert(gfn: number): number;
  remove(gfn: number): number;
  gfn(id: number): number;
  clear(): void;
  [Symbol.iterator](): Iterator<number>;
}

/** GFNs that crowd: runs, multiples of large powers of two, and the same low 32 bits with other high ones. */
const universe = [
  ...Array.from({ length: 64 }, (_, i) => i),
  ...Array.from({ length: 64 }, (_, i) => i * 2 ** 16),
  ...Array.from({ length: 64 }, (_, i) => 2 ** 32 * (i + 1) + (i % 3)),
  ...Array.from({ length: 64 }, (_, i) => 2 ** 40 - 1 - i),
];

/** Play `steps` random operations on `frames` and on a Map; returns the first difference. */
function difference(frames: Frames, seed: number, steps: number): string | undefined {
  const next = random(seed);
  const model = new Map<number, number>();
  for (let step = 0; step < steps; step++) {
    const gfn = universe[next(universe.length)]!;
    const at = `seed ${seed}, step ${step}, frame ${gfn}`;
    const known = model.get(gfn) ?? -1;
    if (frames.find(gfn) !== known) return `${at}: find`;
    // Phases in which it fills, and phases in which it empties.
    const filling = Math.floor(step / 500) % 2 === 0;
    if (next(4000) === 0) {
      frames.clear();
      model.clear();
    } else if (known < 0 && (filling || next(4) === 0)) {
      const id = frames.insert(gfn);
      if (id < 0 || id >= frames.capacity || frames.gfn(id) !== gfn) return `${at}: insert`;
      if ([...model.values()].includes(id)) return `${at}: insert gave an id that is in use`;
      model.set(gfn, id);
    } else if (!filling || next(8) === 0) {
      if (frames.remove(gfn) !== known) return `${at}: remove`;
      model.delete(gfn);
    }
    if (frames.size !== model.size) return `${at}: size`;
  }
  const order = (a: number, b: number) => a - b;
  const held = [...frames].sort(order);
  return held.join() === [...model.keys()].sort(order).join() ? undefined : `seed ${seed}: iteration`;
}

for (let seed = 1; seed <= 20; seed++)
  test(`a FrameIndex is a Map of stable ids, over 5,000 random operations (seed ${seed})`, () =>
    assert.equal(difference(new FrameIndex(), seed, 5000), undefined));

test("broken twin: an index that forgets a frame whose low 32 bits are those of another is caught", () => {
  class Twin extends FrameIndex {
    override find(gfn: number): number {
      return super.find(gfn % 2 ** 32);
    }
  }
  assert.match(difference(new Twin(), 1, 5000) ?? "", /: find$/);
});

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
