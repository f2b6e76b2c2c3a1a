/** The kernel module does what the case table says; modules broken on purpose do not. */
import assert from "node:assert/strict";
import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, type TestContext, test } from "node:test";
import { demand } from "../../src/control/guest-side.ts";
import type { GuestAgent } from "../../src/machine/qemu/agent.ts";
import { ensureGuest, type Guest } from "../../src/machine/qemu/guest.ts";
import { GUEST_SOURCES } from "../../src/machine/qemu/module.ts";
import { startQemu } from "../../src/machine/qemu/qemu.ts";
import { firstDifference } from "../support/run-driver-case.ts";
import { CASES, MACHINE } from "../vectors/driver-cases.ts";
import { KernelModule } from "./kernel-module.ts";

/** A guest without any device of ours. */
async function bootedGuest(t: TestContext, guest: Guest): Promise<GuestAgent> {
  const qemu = await startQemu({ ...guest, ...MACHINE, accel: "auto" });
  t.after(() => qemu.close());
  await qemu.resume();
  await qemu.agent.hello(90_000);
  return qemu.agent;
}

const load = (agent: GuestAgent, parameters: string) =>
  demand(agent, `modprobe coiommu ${parameters}`, "loading the module");
const unload = (agent: GuestAgent) => demand(agent, "rmmod coiommu", "unloading the module");

test("the kernel module passes every case", async (t) => {
  const agent = await bootedGuest(t, await ensureGuest((text) => t.diagnostic(text)));
  await load(agent, "selftest=1");
  const driver = new KernelModule(agent);
  for (const tested of CASES)
    await t.test(tested.name, async () => assert.equal(await firstDifference(driver, tested), undefined));
  await unload(agent);
});
