/** Two VMs on one host: a guest that claims pages and never uses them is seen, bounded, and alone with its trouble. */
import assert from "node:assert/strict";
import { appendFileSync, readFileSync } from "node:fs";
import { type TestContext, test } from "node:test";
import { milliseconds } from "../../src/base/units.ts";
import { claimsOf } from "../../src/control/claims.ts";
import { demand } from "../../src/control/guest-side.ts";
import type { Vm } from "../../src/control/vm.ts";
import { runFio } from "../../src/machine/qemu/fio.ts";
import { ensureGuest } from "../../src/machine/qemu/guest.ts";
import { parseFioWorkload } from "../../src/machine/workload-text.ts";
import { writeTwins } from "./broken-modules.ts";
import { bootedVm } from "./support.ts";

const QUOTA = 400;
const WANTED = 1000;
const IDLE = 100;
const PARAMETERS = "/sys/module/coiommu/parameters";

/** A guest whose module has a driver in it that hoards. */
function selfishGuest(t: TestContext) {
  const sources = writeTwins(t, []);
  const hoard = readFileSync(new URL("./hoard.c", import.meta.url), "utf8");
  appendFileSync(`${sources}/main.c`, `\n#define HOARD_IDLE ${IDLE}\n${hoard}`);
  return ensureGuest((text) => t.diagnostic(text), sources);
}

const claims = (vm: Vm) => claimsOf(vm, { strategy: "coiommu" });

test("a selfish VM reaches its quota and no more, and one beside it works as if alone", async (t) => {
  const guest = await selfishGuest(t);
  // No pass but those that requests at the quota make.
  const selfish = await bootedVm(t, { guest, quota: QUOTA, cpus: 1, interval: milliseconds(600_000) });
  const honest = await bootedVm(t, { cpus: 1 });
  const hoarding = demand(
    selfish.qemu.agent,
    `echo ${WANTED} >${PARAMETERS}/hoard; cat ${PARAMETERS}/hoarded ${PARAMETERS}/hoard_refused`,
    "hoarding",
  );
  const workload = parseFioWorkload("fio:rw=randwrite,bs=16k,iodepth=8,size=16M,seconds=3");
  const [said, written] = await Promise.all([hoarding, runFio(honest.qemu.agent, workload)]);
  const [hoarded, refused] = said.trim().split("\n").map(Number) as [number, number];
  const seen = { hoarded, refused, selfish: claims(selfish), honest: claims(honest) };
  t.diagnostic(JSON.stringify({ ...seen, peaks: [selfish.pins.framesPeak, honest.pins.framesPeak] }));

  const { pins } = selfish;
  assert.equal(hoarded + refused, WANTED);
  assert.ok(refused > 0 && pins.pinRequestsRefused >= refused, "it was told");
  assert.deepEqual([pins.framesPeak, pins.framesNow, pins.passes], [QUOTA, QUOTA, 0]);
  assert.ok(pins.framesUnpinned >= IDLE, "what was idle was unpinned before a request was refused");
  assert.ok(seen.selfish.framesNeverTransferred! >= hoarded && hoarded > QUOTA / 2);
  assert.ok(seen.selfish.framesClaimed! <= QUOTA);

  assert.deepEqual([written.verified, written.errors, honest.disk.faults], [true, 0, 0]);
  assert.deepEqual([honest.pins.pinRequestsRefused, honest.pins.quota], [0, Number.POSITIVE_INFINITY]);
  assert.ok(seen.honest.framesClaimed! > 0);
  assert.ok(seen.honest.framesNeverTransferred! <= seen.honest.framesClaimed! / 10, "it uses what it claims");
});
