/** Parts that fail on purpose. */
import assert from "node:assert/strict";
import { type TestContext, test } from "node:test";
import { UserError } from "../../src/base/errors.ts";
import { milliseconds } from "../../src/base/units.ts";
import { EmbeddedMachine } from "../../src/control/embedded.ts";
import type { EmbeddedOptions } from "../../src/control/embedded-plan.ts";
import { run } from "../../src/control/run.ts";
import { parseWorkload } from "../../src/control/workload.ts";
import { FRONT_ENDS } from "../../src/virtio/front-end.ts";
import { eventually } from "../support/eventually.ts";

const options: EmbeddedOptions = {
  memoryMiB: 128,
  cpus: 2,
  strategy: "coiommu",
  policy: "lru",
  interval: milliseconds(50),
  quota: Number.POSITIVE_INFINITY,
  beforeActivation: "none",
  activationTimeout: Number.POSITIVE_INFINITY,
  pinner: "software",
  disk: { sizeMiB: 64 },
  workload: parseWorkload("fio:rw=randrw,seconds=60,size=8M"),
};
const entry = (name: string) => new URL(`./${name}.ts`, import.meta.url);

async function working(t: TestContext, overrides: Partial<EmbeddedOptions> = {}) {
  const machine = await EmbeddedMachine.start({ ...options, ...overrides });
  t.after(() => machine.close().catch(() => {}));
  await machine.resume();
  await machine.boot();
  // Its end is of no interest: what is broken is found by the oracle.
  machine.work(options.workload).catch(() => {});
  return machine;
}
const faults = (machine: EmbeddedMachine) => machine.devices.reduce((sum, d) => sum + d.faults, 0);

for (const frontEnd of FRONT_ENDS) {
  test(`the DMA fault oracle catches an unpinner that does not look at COUNT: ${frontEnd}`, async (t) => {
    const machine = await working(t, { frontEnd, backendEntry: entry("broken-unpinner") });
    assert.ok(await eventually(() => faults(machine) > 0, 20_000), "no DMA fault was seen");
    if (frontEnd === "crosvm") return; // it has no event queue
    const told = () => machine.drivers!.reduce((sum, driver) => sum + driver.faults, 0);
    assert.ok(await eventually(() => told() > 0, 5000), "the guest's driver is told of it");
    assert.ok(told() <= faults(machine));
  });

  test(`the same with the real unpinner: passes, and no fault: ${frontEnd}`, async (t) => {
    const machine = await working(t, { frontEnd });
    assert.ok(await eventually(() => machine.pins.passes > 20 && machine.pins.framesUnpinned > 0, 20_000));
    assert.equal(faults(machine), 0);
  });
}

/** How a run of `overrides` fails, and how long that took. */
async function failure(overrides: Partial<EmbeddedOptions>): Promise<string> {
  const settings = { ...options, ...overrides };
  const began = performance.now();
  const error = await run(
    settings,
    () => EmbeddedMachine.start(settings),
    () => {},
  ).then(
    () => assert.fail("it went well"),
    (e: unknown) => e,
  );
  assert.ok(error instanceof UserError, String(error));
  assert.ok(performance.now() - began < 15_000, "and soon");
  assert.doesNotMatch(error.message, /\n/);
  return error.message;
}

test("a backend whose thread ends, while a CPU waits for it, ends the run with one sentence", async () => {
  assert.equal(await failure({ backendEntry: entry("dying-backend") }), "the backend has ended");
});

test("a device with a bug ends the run with one sentence that says where", async () => {
  assert.match(
    await failure({ deviceEntry: entry("failing-device") }),
    /^the disk has ended: internal error, please report it: index 7 of 5 \(failing-device\.ts:\d+\)$/,
  );
});
