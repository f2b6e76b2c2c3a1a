import assert from "node:assert/strict";
import test from "node:test";
import fc from "fast-check";
import { fails, holds } from "../../test/support/property.ts";
import { InvariantViolation } from "../base/errors.ts";
import type { Gfn } from "../base/units.ts";
import { Ledger, NO_TABLE } from "./ledger.ts";

const frame = (gfn: number) => gfn as Gfn;

const change = fc.record({
  gfn: fc.tuple(fc.nat(60), fc.constantFrom(0, 2 ** 33)).map(([low, high]) => frame(low + high)),
  what: fc.constantFrom("add or remove", "add or claim"),
  generation: fc.nat(6),
});

const keepsHandlesAndGenerations = (create: () => Ledger) =>
  fc.property(fc.array(change, { maxLength: 400, size: "max" }), (changes) => {
    const ledger = create();
    const model = new Map<Gfn, { handle: number; generation: number }>();
    let peak = 0;
    changes.forEach(({ gfn, what, generation }, handle) => {
      const known = model.get(gfn);
      assert.equal(ledger.has(gfn), known !== undefined);
      if (!known) {
        ledger.add(gfn, handle, generation);
        model.set(gfn, { handle, generation });
      } else if (what === "add or claim") {
        ledger.claim(gfn, generation);
        known.generation = generation;
      } else {
        assert.equal(ledger.remove(gfn), known.handle, "handle");
        model.delete(gfn);
      }
      peak = Math.max(peak, model.size);
    });
    assert.deepEqual([ledger.size, ledger.peak], [model.size, peak]);
    assert.deepEqual(new Set(ledger.frames()), new Set(model.keys()));
    for (const [gfn, { handle, generation }] of model)
      assert.deepEqual([ledger.handle(gfn), ledger.generation(gfn)], [handle, generation], "generation");
  });

holds(
  "the ledger is a Map from frame to handle and generation",
  keepsHandlesAndGenerations(() => new Ledger()),
);

fails(
  "a ledger that claims a frame without remembering for whom",
  keepsHandlesAndGenerations(
    () =>
      new (class extends Ledger {
        override claim(): void {}
      })(),
  ),
  /generation/,
);

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

test("needs are counted per frame, begin at none for a frame that comes back, and cannot fall below", () => {
  const ledger = new Ledger();
  for (const gfn of [3, 4] as Gfn[]) ledger.add(gfn, 1, NO_TABLE);
  for (const gfn of [3, 3, 4] as Gfn[]) ledger.need(gfn);
  ledger.giveUp(3 as Gfn);
  ledger.giveUp(4 as Gfn);
  assert.deepEqual([ledger.isNeeded(3 as Gfn), ledger.isNeeded(4 as Gfn)], [true, false]);
  assert.throws(() => ledger.giveUp(4 as Gfn), InvariantViolation);
  ledger.remove(3 as Gfn);
  ledger.add(3 as Gfn, 1, NO_TABLE);
  assert.equal(ledger.isNeeded(3 as Gfn), false);
});
