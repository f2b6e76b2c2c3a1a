import assert from "node:assert/strict";
import test from "node:test";
import { random } from "../../test/support/random.ts";
import { InvariantViolation } from "../base/errors.ts";
import type { Gfn } from "../base/units.ts";
import { Ledger } from "./ledger.ts";

const frame = (gfn: number) => gfn as Gfn;

test("the ledger keeps handle and generation of each frame, over 20,000 random operations", () => {
  const next = random(11);
  const ledger = new Ledger();
  const model = new Map<number, [handle: number, generation: number]>();
  let peak = 0;
  for (let i = 0; i < 20_000; i++) {
    const gfn = next(500) + (next(2) ? 2 ** 33 : 0);
    const known = model.get(gfn);
    if (!known) {
      ledger.add(frame(gfn), i, i % 7);
      model.set(gfn, [i, i % 7]);
    } else if (next(2)) {
      ledger.claim(frame(gfn), i % 5);
      known[1] = i % 5;
    } else {
      assert.equal(ledger.remove(frame(gfn)), known[0]);
      model.delete(gfn);
    }
    peak = Math.max(peak, model.size);
  }
  assert.deepEqual([ledger.size, ledger.peak], [model.size, peak]);
  assert.deepEqual(new Set(ledger.frames()), new Set(model.keys()));
  for (const [gfn, [handle, generation]] of model)
    assert.deepEqual([ledger.handle(frame(gfn)), ledger.generation(frame(gfn))], [handle, generation]);
});

for (const [what, use] of [
  ["removed", (l: Ledger) => l.remove(frame(2))],
  ["claimed", (l: Ledger) => l.claim(frame(2), 1)],
  ["asked for its handle", (l: Ledger) => l.handle(frame(2))],
  ["asked for its generation", (l: Ledger) => l.generation(frame(2))],
] as const)
  test(`a frame that is not in the ledger cannot be ${what}: that is a bug of ours`, () => {
    const ledger = new Ledger();
    ledger.add(frame(1), 0, 0);
    assert.throws(() => use(ledger), InvariantViolation);
  });
