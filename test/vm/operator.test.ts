/** What an operator changes while a real guest works. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { readCounters, unbindDisk } from "../../src/control/guest-side.ts";
import { runFio } from "../../src/machine/qemu/fio.ts";
import { parseFioWorkload } from "../../src/machine/workload-text.ts";
import { eventually } from "../support/eventually.ts";
import { bootedVm, INTERVAL_MS } from "./support.ts";

const ALL = Number.POSITIVE_INFINITY;
const waits = new AbortController().signal;

test("policy, quota, parking and unpinning at run time: the guest loses nothing", async (t) => {
  const vm = await bootedVm(t);
  const { operator, pins } = vm;
  const { agent } = vm.qemu;
  const working = runFio(agent, parseFioWorkload("fio:rw=randwrite,bs=16k,iodepth=32,seconds=3"));
  const requests = pins.pinRequests;
  await eventually(() => pins.pinRequests > requests);
  await operator.setPolicy("off");
  for (let i = 0; i < 20; i++) await operator.unpinIdle(0, ALL, waits);
  await operator.setQuota(300);
  await operator.setPolicy("lru");
  await operator.setQuota(ALL);
  const written = await working;
  assert.deepEqual([written.verified, written.errors, vm.disk.faults], [true, 0, 0]);

  await operator.park(true);
  await assert.rejects(operator.unpinIdle(0, ALL, waits), /parked/);
  await unbindDisk(agent);
  const held = pins.framesNow;
  await sleep(3 * INTERVAL_MS);
  assert.ok(held > 0 && pins.framesNow === held, "parked");
  await operator.park(false);
  assert.deepEqual(await operator.unpinIdle(0, ALL, waits), { unpinned: held, stayed: 0 });
  assert.equal(pins.framesNow, 0);
  assert.equal((await readCounters(agent)).underflow, 0);
});
