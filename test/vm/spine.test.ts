import assert from "node:assert/strict";
import { test } from "node:test";
import { demand, loadDrivers, readCounters, unbindDisk } from "../../src/control/guest-side.ts";
import { runFio } from "../../src/machine/qemu/fio.ts";
import { ensureGuest } from "../../src/machine/qemu/guest.ts";
import { parseFioWorkload } from "../../src/machine/workload-text.ts";
import { FRONT_ENDS } from "../../src/virtio/front-end.ts";
import { eventually } from "../support/eventually.ts";
import { bootedVm, comesUpAgain, pinnedPages, twoPasses } from "./support.ts";

for (const frontEnd of FRONT_ENDS)
  test(`a guest's disk is pinned precisely, unpinned lazily, and loses nothing: ${frontEnd}`, async (t) => {
    const before = pinnedPages();
    const vm = await bootedVm(t, { frontEnd });
    const { agent } = vm.qemu;

    const written = await runFio(agent, parseFioWorkload("fio:rw=randwrite,bs=4k,iodepth=32,seconds=3"));
    assert.deepEqual([written.verified, written.errors], [true, 0]);
    const read = await runFio(agent, parseFioWorkload("fio:rw=randread,bs=16k,iodepth=8,seconds=3"));
    assert.equal(read.errors, 0);
    assert.ok(written.ops > 0 && read.ops > 0);

    const busy = await readCounters(agent);
    assert.ok(busy.map! > written.ops, "every request is mapped at least once");
    assert.ok(busy.pin_requests! < busy.map! / 10, "most maps find their frames pinned");
    assert.equal(vm.pins.pinRequests, busy.pin_requests, "the device has served what the driver has asked");

    await unbindDisk(agent);
    const idle = await readCounters(agent);
    assert.deepEqual([idle.live_frames, idle.live_refs, idle.underflow], [0, 0, 0]);
    assert.equal(idle.frames_mapped, idle.frames_unmapped);
    assert.deepEqual([idle.pin_refused, vm.pins.pinRequestsRefused], [0, 0]);
    assert.deepEqual([vm.disk.faults, vm.disk.errors], [0, 0]);

    await twoPasses(vm);
    const { framesNow, framesFirmware, framesPinned, framesUnpinned } = vm.pins;
    // Through crosvm's function no driver can say that its table is complete.
    const left = frontEnd === "crosvm" ? framesFirmware : 0;
    assert.ok(framesNow <= left, "every other frame is unpinned after two idle intervals");
    assert.equal(framesPinned - framesUnpinned, framesNow);
    assert.ok(framesPinned > left + 32, "there were others");
    assert.ok(await eventually(() => pinnedPages() - before === framesNow, 5000), "the kernel says so too");

    await demand(agent, "rmmod coiommu", "unloading the module");
    await demand(
      agent,
      `modprobe coiommu${frontEnd === "crosvm" ? " crosvm=1" : ""} && echo 0000:00:04.0 >/sys/bus/pci/drivers/virtio-pci/bind`,
      "loading it again",
    );
    const again = await runFio(agent, parseFioWorkload("fio:rw=randread,bs=4k,iodepth=4,seconds=1"));
    assert.deepEqual([again.errors, vm.disk.faults], [0, 0]);
  });

test("a module that is loaded after the disk's driver takes the disk over", async (t) => {
  const vm = await bootedVm(t, { load: false });
  const { agent } = vm.qemu;
  const disk =
    "i=0; while [ ! -b /dev/vda ] && [ $i -lt 200 ]; do i=$((i+1)); usleep 50000; done; [ -b /dev/vda ]";
  await demand(agent, `modprobe virtio_pci; modprobe virtio_blk; ${disk}`, "loading the disk's driver alone");
  await demand(agent, "dd if=/dev/vda of=/dev/null bs=64k count=16 iflag=direct", "reading untracked");
  assert.ok(vm.pins.framesFirmware > 256, "what the disk touches before is pinned at that moment");
  await demand(agent, `modprobe coiommu; ${disk}`, "loading the module late");
  const read = await runFio(agent, parseFioWorkload("fio:rw=randread,bs=4k,iodepth=4,seconds=1"));
  assert.equal(read.errors, 0);
  assert.equal(vm.disk.faults, 0);
  const counters = await readCounters(agent);
  assert.ok(counters.map! >= read.ops);
});

test("a buffer that bounces is tracked where the device touches it", async (t) => {
  const vm = await bootedVm(t, { append: ["swiotlb=force"] });
  const { agent } = vm.qemu;
  const written = await runFio(agent, parseFioWorkload("fio:rw=randwrite,bs=4k,iodepth=8,seconds=1,size=8M"));
  assert.deepEqual([written.verified, written.errors, vm.disk.faults], [true, 0, 0]);
  const counters = await readCounters(agent);
  assert.ok(counters.bounced! > written.ops);
});

for (const frontEnd of FRONT_ENDS)
  test(`a machine reset releases everything, and the next kernel is tracked like the first: ${frontEnd}`, async (t) => {
    const vm = await bootedVm(t, { frontEnd });
    const { agent, qmp } = vm.qemu;
    await runFio(agent, parseFioWorkload("fio:rw=randread,bs=4k,iodepth=32,seconds=1"));
    const before = { ...vm.pins };
    assert.ok(before.framesNow > 0);
    await qmp.execute("set-action", { reboot: "reset" });
    await qmp.execute("system_reset");
    await comesUpAgain(agent);
    assert.ok(vm.pins.framesFirmware > before.framesFirmware, "firmware has its window again");
    assert.ok(
      vm.pins.framesUnpinned - before.framesUnpinned >= before.framesNow,
      "what was pinned before is not",
    );

    await loadDrivers(agent, await ensureGuest(() => {}), "coiommu", { frontEnd });
    const written = await runFio(
      agent,
      parseFioWorkload("fio:rw=randwrite,bs=4k,iodepth=8,seconds=1,size=8M"),
    );
    assert.deepEqual([written.verified, written.errors, vm.disk.faults], [true, 0, 0]);
  });

for (const frontEnd of FRONT_ENDS)
  test(`the DMA fault oracle catches an unpinner that does not look at COUNT: ${frontEnd}`, async (t) => {
    const vm = await bootedVm(t, {
      frontEnd,
      backendEntry: new URL("./broken-unpinner.ts", import.meta.url),
      load: false,
    });
    const { agent } = vm.qemu;
    const script = "while :; do dd if=/dev/vda of=/dev/null bs=4k count=64 iflag=direct; sleep 1; done";
    // Whoever loads or reads may wait for ever, because the disk faults on frames that are mapped: only the oracle is asked.
    loadDrivers(agent, await ensureGuest(() => {}), "coiommu", { frontEnd })
      .then(() => agent.run(script, { timeoutMs: 60_000, what: "reading" }))
      .catch(() => {});
    assert.ok(await eventually(() => vm.disk.faults > 0, 90_000), "no DMA fault was seen");
  });
