/** What pins cost a host that runs out of memory: what it can take from a guest, with everything pinned and with coIOMMU. */
import assert from "node:assert/strict";
import test, { after, before } from "node:test";
import { CHECKOUT } from "./guest.ts";
import { NVME, VfioMachine } from "./machine.ts";

const SET_UP = `modprobe lzo-rle && modprobe zram
echo 512M >/sys/block/zram0/disksize
mkswap /dev/zram0 >/dev/null && swapon /dev/zram0
mount -t cgroup2 cgroup /sys/fs/cgroup
echo +memory >/sys/fs/cgroup/cgroup.subtree_control
mkdir /sys/fs/cgroup/guest`;

let machine: VfioMachine;

before(async () => {
  machine = await VfioMachine.boot({}, console.log);
  await machine.bind(NVME);
  await machine.run(SET_UP);
});
after(() => machine?.close());

/** The guest and its host in a cgroup whose memory is reclaimed, as far as that can be. */
const reclaimed = async (strategy: string) =>
  JSON.parse(
    await machine.run(`echo $$ >/sys/fs/cgroup/guest/cgroup.procs
cd ${CHECKOUT} && exec node test/vfio/reclaim.js ${NVME} ${strategy}`),
  );

test("coIOMMU: what no device uses leaves, what devices use stays, and nothing is lost", async (t) => {
  const { before, after, ...r } = await reclaimed("coiommu");
  t.diagnostic(JSON.stringify({ before, after, ...r }));
  assert.deepEqual(before, { mapped: r.mappedFrames, others: r.otherFrames });
  assert.deepEqual(after, { mapped: r.mappedFrames, others: 0 });
  assert.ok(r.locked < r.lockedWithIdle && r.locked < r.ramFrames / 4, "not much was unpinned");
  assert.deepEqual([r.dmaErrors, r.wrongFrames], [0, 0]);
  assert.deepEqual(machine.faults(), []);
});

test("all memory pinned: nothing leaves", async (t) => {
  const { before, after, ...r } = await reclaimed("static");
  t.diagnostic(JSON.stringify({ before, after, ...r }));
  assert.deepEqual([before, r.locked], [{ mapped: r.mappedFrames, others: r.otherFrames }, r.ramFrames]);
  assert.deepEqual(after, before);
  assert.deepEqual([r.dmaErrors, r.wrongFrames], [0, 0]);
  assert.deepEqual(machine.faults(), []);
});
