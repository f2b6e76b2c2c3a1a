/** Disks that come and go in a VM that somebody else has started. */
import assert from "node:assert/strict";
import { type TestContext, test } from "node:test";
import { milliseconds } from "../../src/base/units.ts";
import { Attachment } from "../../src/control/attach.ts";
import { demand, readCounters } from "../../src/control/guest-side.ts";
import { runFio } from "../../src/machine/qemu/fio.ts";
import { parseFioWorkload } from "../../src/machine/workload-text.ts";
import { eventually } from "../support/eventually.ts";
import { INTERVAL_MS, pinnedPages } from "./support.ts";
import { blockDevice, type UserVm, userVm } from "./user-qemu.ts";

async function attached(t: TestContext, { qmp }: UserVm): Promise<Attachment> {
  const attachment = await Attachment.start({
    qmp,
    assigned: [],
    disks: [],
    policy: "lru",
    interval: milliseconds(INTERVAL_MS),
    pinner: "io_uring",
    quota: () => Number.POSITIVE_INFINITY,
    activationTimeout: Number.POSITIVE_INFINITY,
    onWarning: (text) => assert.fail(text),
  });
  t.after(() => attachment.close());
  return attachment;
}

const faults = ({ devices }: Attachment) => devices.reduce((sum, d) => sum + d.faults, 0);

test("a disk that is plugged and unplugged while another works is tracked, and leaves no pin", async (t) => {
  const before = pinnedPages();
  const vm = await userVm(t, "pc");
  const { agent } = vm;
  const attachment = await attached(t, vm);
  const first = await attachment.plugDisk({ sizeMiB: 64 });
  const load = `modprobe virtio_pci; modprobe virtio_blk; modprobe coiommu; ${blockDevice("vda")}`;
  await demand(agent, load, "loading the drivers");

  const fio = runFio(agent, parseFioWorkload("fio:rw=randwrite,bs=4k,iodepth=16,seconds=6,size=16M"));
  const mapped = async () => (await readCounters(agent)).live_frames!;
  const second = await attachment.plugDisk({ sizeMiB: 32 });
  await demand(agent, blockDevice("vdb"), "waiting for the second disk");
  const alone = await mapped();
  await demand(agent, "dd if=/dev/vdb of=/dev/null bs=64k count=256 iflag=direct", "reading the second disk");
  assert.ok(attachment.devices[1]!.bytes >= 16 * 2 ** 20, "the second disk has served what was read");
  assert.ok(await attachment.unplug(second, 10_000), "the guest lets go of it");
  const written = await fio;
  assert.deepEqual([written.verified, written.errors, faults(attachment)], [true, 0, 0]);
  assert.ok((await mapped()) < alone, "what the second disk had mapped is not");

  assert.ok(await attachment.unplug(first, 10_000), "the guest lets go of the first one too");
  const idle = await readCounters(agent);
  assert.deepEqual([idle.live_frames, idle.underflow, idle.pin_refused], [0, 0, 0]);
  assert.ok(await eventually(() => attachment.pins.framesNow === 0, 5000), "all frames are unpinned");
  assert.ok(await eventually(() => pinnedPages() === before, 5000), "the kernel counts no pin any more");
  assert.deepEqual(await attachment.detach(10_000), []);
});

test("what is plugged where a disk of ours was is not tracked", async (t) => {
  const vm = await userVm(t, "pc", ["-drive", "driver=null-co,if=none,id=other,size=16M"]);
  const { agent, control } = vm;
  const attachment = await attached(t, vm);
  await demand(agent, "modprobe virtio_pci; modprobe virtio_blk; modprobe coiommu", "loading the drivers");
  const disk = await attachment.plugDisk({ sizeMiB: 32 });
  await demand(agent, blockDevice("vda"), "waiting for the disk");
  const slot = ((attachment.bdfOf(disk)! >> 3) & 31).toString(16);
  // By the person, not by us.
  await control.execute("device_del", { id: disk });
  assert.ok(await eventually(() => attachment.bdfOf(disk) === undefined, 10_000), "we hear that it is gone");

  const before = await readCounters(agent);
  await control.execute("device_add", { driver: "nvme", serial: "x", drive: "other", addr: slot });
  await demand(agent, blockDevice("nvme0n1"), "waiting for the other disk");
  await demand(agent, "dd if=/dev/nvme0n1 of=/dev/null bs=64k count=16 iflag=direct", "reading it");
  const after = await readCounters(agent);
  assert.deepEqual([after.map, after.pin_refused], [before.map, 0]);
});
