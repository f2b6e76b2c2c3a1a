import assert from "node:assert/strict";
import test from "node:test";
import { initialLife, type Life, type LifeEvent, nextLife } from "./life.ts";

/** docs/abi.md section 4, as far as events exist for it. */
const table: Record<Life, Record<LifeEvent, Life>> = {
  undecided: {
    "pin-on": "tracked",
    "pin-off": "undecided",
    "device-reset": "undecided",
    "machine-reset": "undecided",
  },
  tracked: {
    "pin-on": "tracked",
    "pin-off": "frozen",
    "device-reset": "frozen",
    "machine-reset": "undecided",
  },
  frozen: {
    "pin-on": "tracked",
    "pin-off": "frozen",
    "device-reset": "frozen",
    "machine-reset": "undecided",
  },
  static: { "pin-on": "tracked", "pin-off": "static", "device-reset": "static", "machine-reset": "static" },
};

for (const [life, row] of Object.entries(table) as [Life, Record<LifeEvent, Life>][])
  for (const [event, next] of Object.entries(row) as [LifeEvent, Life][])
    test(`${life} --${event}--> ${next}`, () =>
      assert.equal(nextLife(life, event, life === "static" ? "all" : "bios"), next));

test("a machine reset leads back to where power-on began", () => {
  for (const before of ["bios", "none", "all"] as const)
    assert.equal(nextLife("tracked", "machine-reset", before), initialLife(before));
  assert.deepEqual([initialLife("all"), initialLife("bios")], ["static", "undecided"]);
});
