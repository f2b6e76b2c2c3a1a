import assert from "node:assert/strict";
import test from "node:test";
import { CHECKOUT } from "./guest.ts";
import { NVME, VfioMachine } from "./machine.ts";

test("Node runs in the proof machine, and its NVMe function is there for user space", async (t) => {
  const machine = await VfioMachine.boot({}, (text) => t.diagnostic(text));
  t.after(() => machine.close());
  await machine.bind(NVME);
  const group = await machine.run(`basename "$(readlink /sys/bus/pci/devices/${NVME}/iommu_group)"`);
  assert.match(await machine.run("ls /dev/vfio"), new RegExp(`^${group}`));
  assert.match(await machine.run("dmesg"), /DMAR-IR: Enabled IRQ remapping/);

  const report = await machine.run(`cd ${CHECKOUT}; node bin/coiommu.js doctor --json -; true`);
  const { checks } = JSON.parse(report) as { checks: { name: string; ok: boolean; detail: string }[] };
  const found = new Map(checks.map(({ name, ok }) => [name, ok]));
  assert.deepEqual([found.get("native module"), found.get("VFIO")], [true, true], report);
  assert.equal(found.get("guest kernel"), false, "a machine without apt is told so");

  assert.deepEqual(machine.faults(), []);
  const failing = machine.node("-e 'console.log(process.version); process.exit(3)'");
  await assert.rejects(failing, /exit code 3.*\nv\d+/s);
});
