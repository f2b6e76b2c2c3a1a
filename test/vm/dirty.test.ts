/** What the kernel module tells of the frames that a disk writes: enough for a copy of memory. */
import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type TestContext, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { demand } from "../../src/control/guest-side.ts";
import { bootedVm } from "./support.ts";

const MIB = 24;
const entry = (name: string) => new URL(`./${name}.ts`, import.meta.url);

interface Found {
  readonly written: number;
  readonly unchanged: number;
  readonly wrong: number;
}

/** Read a disk into the guest's page cache, over and over, while harvests say what to copy. */
async function copied(
  t: TestContext,
  forgetful: boolean,
): Promise<Found & { harvests: number; left: number }> {
  const folder = mkdtempSync(join(tmpdir(), "coiommu-dirty-"));
  t.after(() => rmSync(folder, { recursive: true }));
  process.env.COIOMMU_TEST_WRITTEN = join(folder, "written");
  process.env.COIOMMU_TEST_FOUND = join(folder, "found");
  process.env.COIOMMU_TEST_FORGETFUL = forgetful ? "1" : "0";
  const vm = await bootedVm(t, {
    backendEntry: entry("copying-backend"),
    deviceEntry: entry("recording-disk"),
  });
  const { agent } = vm.qemu;
  const fill = `dd if=/dev/urandom of=/dev/vda bs=1M count=${MIB} && sync && echo 3 >/proc/sys/vm/drop_caches`;
  await demand(agent, fill, "filling the disk");
  await vm.dirty.start();
  const read = `for i in 1 2 3; do
dd if=/dev/vda of=/dev/null bs=64k count=${MIB * 16} || exit 1; echo 1 >/proc/sys/vm/drop_caches; done
dd if=/dev/vda of=/dev/null bs=64k count=${MIB * 16}`;
  let over = false;
  const reading = demand(agent, read, "reading the disk").finally(() => {
    over = true;
  });
  let harvests = 0;
  for (; !over; harvests++) {
    await vm.dirty.harvest();
    await sleep(20);
  }
  await reading;
  await vm.shutDown();
  await vm.dirty.harvest();
  const left = (await vm.dirty.harvest()).length / 2;
  await vm.close();
  return { ...JSON.parse(readFileSync(process.env.COIOMMU_TEST_FOUND, "utf8")), harvests, left };
}

test("every frame of the page cache that the disk wrote is told", async (t) => {
  const found = await copied(t, false);
  t.diagnostic(JSON.stringify(found));
  assert.equal(found.wrong, 0);
  assert.equal(found.left, 0, "and nothing is told twice");
  assert.ok(found.unchanged > 1000 && found.harvests > 5);
});

test("a harvest that forgets D is found out", async (t) => {
  const found = await copied(t, true);
  t.diagnostic(JSON.stringify(found));
  assert.ok(found.wrong > 0);
});
