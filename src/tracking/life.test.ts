import assert from "node:assert/strict";
import test from "node:test";
import { FakeClock } from "../../test/support/clock.ts";
import { milliseconds } from "../base/units.ts";
import { GuestLife, initialLife, type Life, type LifeEvent, nextLife } from "./life.ts";

/** docs/abi.md section 4. */
const table: Record<Life, Record<LifeEvent, Life>> = {
  undecided: {
    "pin-on": "tracked",
    "pin-on-incomplete": "tracked",
    "pin-off": "undecided",
    "device-reset": "undecided",
    "machine-reset": "undecided",
    "activation-timeout": "static",
    "functions-reset": "undecided",
  },
  tracked: {
    "pin-on": "tracked",
    "pin-on-incomplete": "tracked",
    "pin-off": "frozen",
    "device-reset": "frozen",
    "machine-reset": "undecided",
    "activation-timeout": "tracked",
    "functions-reset": "tracked",
  },
  frozen: {
    "pin-on": "tracked",
    "pin-on-incomplete": "tracked",
    "pin-off": "frozen",
    "device-reset": "frozen",
    "machine-reset": "undecided",
    "activation-timeout": "frozen",
    "functions-reset": "undecided",
  },
  static: {
    "pin-on": "tracked",
    "pin-on-incomplete": "static",
    "pin-off": "static",
    "device-reset": "static",
    "machine-reset": "undecided",
    "activation-timeout": "static",
    "functions-reset": "static",
  },
};

for (const [life, row] of Object.entries(table) as [Life, Record<LifeEvent, Life>][])
  for (const [event, next] of Object.entries(row) as [LifeEvent, Life][])
    test(`${life} --${event}--> ${next}`, () => assert.equal(nextLife(life, event, "bios"), next));

test("a machine reset, and a reset of all functions, lead back to where power-on began", () => {
  for (const before of ["bios", "none", "all"] as const) {
    assert.equal(nextLife("tracked", "machine-reset", before), initialLife(before));
    assert.equal(nextLife("frozen", "functions-reset", before), initialLife(before));
  }
  assert.deepEqual([initialLife("all"), initialLife("bios")], ["static", "undecided"]);
});

/** A guest whose bus is as told, with an activation timeout of 10 s. */
function guest(bus: { mastering: boolean; quiet: boolean }, timeout: number = milliseconds(10_000)) {
  const clock = new FakeClock(0, 0);
  const told = { mastering: () => bus.mastering, quiet: () => bus.quiet };
  const life = new GuestLife("bios", timeout, told, clock);
  return {
    clock,
    life,
    after: (ms: number) => {
      clock.time += milliseconds(ms);
      return life.look();
    },
  };
}

test("the timeout counts only when an assigned function masters the bus, then or later", () => {
  const bus = { mastering: false, quiet: false };
  const g = guest(bus);
  assert.equal(g.after(9_999), undefined);
  assert.equal(g.after(1), undefined);
  bus.mastering = true;
  assert.equal(g.life.look(), undefined, "it does not look all the time");
  assert.ok(g.life.lookAt > g.clock.now());
  assert.equal(g.after(100), "activation-timeout");
});

test("the timeout begins anew with a machine reset, and ends with PIN on", () => {
  const g = guest({ mastering: true, quiet: false });
  g.after(6_000);
  g.life.enter("machine-reset");
  assert.equal(g.after(6_000), undefined);
  g.life.enter("pin-on");
  assert.equal(g.after(60_000), undefined);
  assert.equal(g.life.lookAt, Number.POSITIVE_INFINITY);
});

test("a frozen guest is looked at until all its functions are quiet; of other states that is no news", () => {
  const bus = { mastering: false, quiet: true };
  const g = guest(bus, Number.POSITIVE_INFINITY);
  assert.equal(g.after(1000), undefined);
  g.life.enter("pin-on");
  assert.equal(g.after(1000), undefined);
  bus.quiet = false;
  g.life.enter("pin-off");
  assert.equal(g.after(1000), undefined);
  bus.quiet = true;
  assert.equal(g.after(1000), "functions-reset");
});
