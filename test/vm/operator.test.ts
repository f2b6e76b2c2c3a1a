/** What an operator changes while a real guest works. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { milliseconds } from "../../src/base/units.ts";
import { readCounters, unbindDisk } from "../../src/control/guest-side.ts";
import { runFio } from "../../src/machine/qemu/fio.ts";
import { parseFioWorkload } from "../../src/machine/workload-text.ts";
import { policies } from "../../src/policy/registry.ts";
import { eventually } from "../support/eventually.ts";
import { bootedVm, INTERVAL_MS } from "./support.ts";

const INFINITY = Number.POSITIVE_INFINITY;
const ALL = { first: 0, end: INFINITY };

test("policy, quota, parking and unpinning at run time: the guest loses nothing", async (t) => {
  const vm = await bootedVm(t);
  const { operator, pins } = vm;
  const { agent } = vm.qemu;
  const working = runFio(agent, parseFioWorkload("fio:rw=randwrite,bs=16k,iodepth=32,seconds=3"));
  const requests = pins.pinRequests;
  await eventually(() => pins.pinRequests > requests);
  await operator.setPolicy("off");
  for (let i = 0; i < 20; i++) await operator.unpinIdle(ALL);
  await operator.setQuota(300);
  await operator.setPolicy("lru");
  await operator.setQuota(INFINITY);
  const written = await working;
  assert.deepEqual([written.verified, written.errors, vm.disk.faults], [true, 0, 0]);

  await operator.park(true);
  await assert.rejects(operator.unpinIdle(ALL), /parked/);
  await unbindDisk(agent);
  const held = pins.framesNow;
  await sleep(3 * INTERVAL_MS);
  assert.ok(held > 0 && pins.framesNow === held, "parked");
  await operator.park(false);
  assert.deepEqual(await operator.unpinIdle(ALL), { unpinned: held, stayed: 0, stayedRanges: [] });
  assert.equal(pins.framesNow, 0);
  assert.equal((await readCounters(agent)).underflow, 0);
});

test("every policy in turn, and one of a file, while the guest writes: nothing is lost, and nothing stays", async (t) => {
  const example = new URL("../../examples/policies/keep.ts", import.meta.url).pathname;
  const vm = await bootedVm(t, { policy: `${example},for=${INTERVAL_MS}ms` });
  const { operator, pins } = vm;
  const { agent } = vm.qemu;
  const working = runFio(agent, parseFioWorkload("fio:rw=randwrite,bs=16k,iodepth=32,seconds=5"));
  let over = false;
  void working.finally(() => {
    over = true;
  });
  const unpinned: Record<string, number> = {};
  await eventually(() => pins.framesUnpinned > 0, 10_000);
  unpinned.keep = pins.framesUnpinned;
  await operator.setInterval({ min: milliseconds(50), max: milliseconds(INTERVAL_MS) });
  const choices = policies.map(({ name }) => (name === "pressure" ? "pressure,low=0%,high=0%" : name));
  while (!over)
    for (const choice of choices) {
      await operator.setPolicy(choice);
      await sleep(100);
    }
  const written = await working;
  assert.deepEqual([written.verified, written.errors, vm.disk.faults], [true, 0, 0]);
  assert.ok(unpinned.keep! > 0, "the policy of the file unpins");
  await operator.setPolicy("lru");
  await unbindDisk(agent);
  assert.ok(await eventually(() => pins.framesNow === 0, 10_000), `${pins.framesNow} frames stay pinned`);
  assert.equal((await readCounters(agent)).underflow, 0);
});

test("speculation in a guest: what is pinned unasked is used, or unpinned, and nothing is lost", async (t) => {
  const vm = await bootedVm(t, { speculate: "neighbours,judged=65536" });
  const { operator, pins } = vm;
  const { agent } = vm.qemu;
  const written = await runFio(agent, parseFioWorkload("fio:rw=randwrite,bs=16k,iodepth=32,seconds=4"));
  assert.deepEqual([written.verified, written.errors, vm.disk.faults], [true, 0, 0]);
  assert.ok(pins.framesSpeculative > 0 && pins.speculationSaved > 0, `${pins.speculationSaved} saved`);
  await operator.setSpeculation("off");
  const { framesSpeculative } = pins;
  await runFio(agent, parseFioWorkload("fio:rw=randread,bs=16k,iodepth=32,seconds=1"));
  assert.equal(pins.framesSpeculative, framesSpeculative);
  await unbindDisk(agent);
  assert.ok(await eventually(() => pins.framesNow === 0, 10_000), `${pins.framesNow} frames stay pinned`);
  assert.equal(pins.speculationSaved + pins.speculationWasted, framesSpeculative);
  assert.equal((await readCounters(agent)).underflow, 0);
});
