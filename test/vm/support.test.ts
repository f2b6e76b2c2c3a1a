import assert from "node:assert/strict";
import { test } from "node:test";
import type { Vm } from "../../src/control/vm.ts";
import { LIVES } from "../../src/tracking/life.ts";
import { twoPasses } from "./support.ts";

const pinsOf = (now: object) =>
  ({ passes: 7, parks: 0, parkedByOperator: 0, life: LIVES.indexOf("tracked"), ...now }) as Vm["pins"];

test("who waits for passes that do not begin is told why, and who waits for some that do goes on", async () => {
  await assert.rejects(twoPasses({ pins: pinsOf({ parkedByOperator: 1 }) }, 100), {
    message:
      "0 unpin passes began in 100 ms: parked 0 times by the guest, 1 by the operator; the guest is tracked",
  });
  const pins = pinsOf({});
  const timer = setInterval(() => pins.passes++, 20);
  await twoPasses({ pins }, 5000).finally(() => clearInterval(timer));
  assert.ok(pins.passes >= 10);
});
