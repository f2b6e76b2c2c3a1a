import assert from "node:assert/strict";
import { test } from "node:test";
import { demand, readCounters } from "../../src/control/guest-side.ts";
import { eventually } from "../support/eventually.ts";
import { bootedVm } from "./support.ts";

/** A line of the module's log for a fault of our disk. */
const LOGGED = /DMA fault of 0000:00:04\.0: (read|write) of 0x[0-9a-f]+: not pinned, or unknown/;

test("the guest's module logs and counts the DMA faults of its disk, which are all that the host has seen", async (t) => {
  const vm = await bootedVm(t, { backendEntry: new URL("./broken-unpinner.ts", import.meta.url) });
  const { agent } = vm.qemu;
  assert.equal((await readCounters(agent)).faults, 0);
  // Whoever reads may wait for ever, because the disk faults on frames that are mapped.
  const script = "dd if=/dev/vda of=/dev/null bs=4k count=64 iflag=direct >/dev/null 2>&1 &";
  for (let tries = 0; vm.disk.faults === 0 && tries < 12; tries++) {
    await agent.run(script, { timeoutMs: 5000, what: "reading" }).catch(() => {});
    await eventually(() => vm.disk.faults > 0, 2000);
  }
  const seen: number[] = [];
  const agree = async () => {
    const { faults } = await readCounters(agent);
    const { faultsReported, faultsDropped } = vm.pins;
    seen.splice(0, 4, faults!, faultsReported, faultsDropped, vm.disk.faults);
    return faults! > 0 && faults === faultsReported && faultsReported + faultsDropped === vm.disk.faults;
  };
  for (let tries = 0; !(await agree()) && tries < 20; tries++) await eventually(() => false, 500);
  t.diagnostic(`counted by the module, reported, dropped, counted by the disk: ${seen}`);
  assert.ok(await agree(), `${seen}`);
  assert.match(await demand(agent, "dmesg", "reading the log"), LOGGED);
});
