import assert from "node:assert/strict";
import test from "node:test";
import { InvariantViolation } from "../base/errors.ts";
import { SLOTS_PER_GROUP, SlotTable } from "./slots.ts";

const take = (table: SlotTable, count: number) => {
  const out = new Int32Array(count);
  table.take(count, out);
  return [...out];
};

test("slots taken together are neighbours, also when they came back in disorder", () => {
  const table = new SlotTable(1);
  table.grow();
  take(table, SLOTS_PER_GROUP);
  for (const slot of [103, 100, 104, 102, 101]) table.give(slot);
  assert.deepEqual(take(table, 5), [100, 101, 102, 103, 104]);
  assert.equal(table.free, 0);
});

test("a slot freed in a full group is found across group borders", () => {
  const table = new SlotTable(3);
  for (let i = 0; i < 3; i++) {
    table.grow();
    take(table, SLOTS_PER_GROUP);
  }
  table.give(SLOTS_PER_GROUP + 31);
  table.give(2 * SLOTS_PER_GROUP);
  assert.deepEqual(take(table, 2).sort(), [SLOTS_PER_GROUP + 31, 2 * SLOTS_PER_GROUP]);
  assert.equal(table.grow(), false);
});

test("to give a free or unknown slot is a bug", () => {
  const table = new SlotTable(1);
  table.grow();
  const [slot] = take(table, 1);
  table.give(slot!);
  for (const bad of [slot!, 5, -1, SLOTS_PER_GROUP]) assert.throws(() => table.give(bad), InvariantViolation);
  assert.equal(table.free, SLOTS_PER_GROUP);
});

test("agrees with a set under random use", () => {
  const table = new SlotTable(2);
  table.grow();
  table.grow();
  const taken = new Set<number>();
  let state = 12345;
  const below = (n: number) => {
    state = (Math.imul(state, 1103515245) + 12345) >>> 0;
    return (state >>> 8) % n;
  };
  for (let turn = 0; turn < 3000; turn++) {
    if (below(2) === 0) {
      for (const slot of take(table, Math.min(below(60), table.free))) {
        assert.ok(!taken.has(slot) && slot < 2 * SLOTS_PER_GROUP);
        taken.add(slot);
      }
    } else {
      for (const slot of [...taken].filter(() => below(4) === 0).slice(0, 60)) {
        table.give(slot);
        taken.delete(slot);
      }
    }
    assert.equal(table.free, 2 * SLOTS_PER_GROUP - taken.size);
  }
});
