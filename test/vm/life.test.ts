/** A guest's whole life: no driver, a late one, one that goes, resets, kexec, and firmware that uses the disk. */
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { closeSync, openSync, readFileSync, writeFileSync, writeSync } from "node:fs";
import { join } from "node:path";
import { type TestContext, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { milliseconds } from "../../src/base/units.ts";
import { demand, loadDrivers, readCounters, unbindDisk } from "../../src/control/guest-side.ts";
import type { Vm } from "../../src/control/vm.ts";
import type { GuestAgent } from "../../src/machine/qemu/agent.ts";
import { runFio } from "../../src/machine/qemu/fio.ts";
import { ensureGuest } from "../../src/machine/qemu/guest.ts";
import { parseFioWorkload } from "../../src/machine/workload-text.ts";
import { LIVES } from "../../src/tracking/life.ts";
import { FRONT_ENDS } from "../../src/virtio/front-end.ts";
import { eventually } from "../support/eventually.ts";
import { bootImage, SAYS_DONE, writtenSum } from "./boot-sector.ts";
import { bootedVm, comesUpAgain, INTERVAL_MS, pinnedPages, startedVm, twoPasses } from "./support.ts";
import { blockDevice, scratch } from "./user-qemu.ts";

const lifeOf = ({ pins }: Vm) => LIVES[pins.life];
const TRACKED = "modprobe coiommu";
const DISK = "0000:00:04.0";
const bindDisk = (agent: GuestAgent) =>
  demand(
    agent,
    `echo ${DISK} >/sys/bus/pci/drivers/virtio-pci/bind; ${untilDisk}`,
    "binding the disk's driver",
  );
const untilDisk = blockDevice("vda");
const UNTRACKED = `modprobe virtio_pci; modprobe virtio_blk; ${untilDisk}`;

/** fio writes and checks what it wrote, and no DMA faults. */
async function diskWorks(vm: Vm): Promise<void> {
  const workload = parseFioWorkload("fio:rw=randwrite,bs=4k,iodepth=8,seconds=1,size=8M");
  const { verified, errors } = await runFio(vm.qemu.agent, workload);
  assert.deepEqual([verified, errors, vm.disk.faults, vm.disk.errors], [true, 0, 0, 0]);
}

for (const frontEnd of FRONT_ENDS)
  test(`a guest that never loads the module is pinned as a whole, and works; loaded late, it is tracked after all: ${frontEnd}`, async (t) => {
    const before = pinnedPages();
    const warnings: string[] = [];
    const vm = await bootedVm(t, {
      ...{ frontEnd, load: false, activationTimeout: milliseconds(500) },
      onWarning: (text) => warnings.push(text),
    });
    const { agent } = vm.qemu;
    const { pins } = vm;
    await demand(agent, UNTRACKED, "loading the disk's driver alone");
    assert.ok(
      await eventually(() => lifeOf(vm) === "static" && pins.backgroundPinned === pins.backgroundFrames),
    );
    const frames = pins.backgroundFrames;
    assert.ok(frames >= (0.9 * 512 * 2 ** 20) / 4096);
    assert.deepEqual([pins.framesNow, pinnedPages() - before], [frames, frames], "the kernel says so too");
    assert.deepEqual(
      warnings.map((text) => /pinning all of the guest's memory/.test(text)),
      [true],
    );
    await diskWorks(vm);
    assert.equal(pins.framesNow, frames);

    if (frontEnd === "crosvm") {
      // Its driver cannot say that its table is complete: it is served, and nothing is let go of.
      await demand(agent, `${TRACKED} crosvm=1; ${untilDisk}`, "loading the module late");
      await assert.rejects(twoPasses(vm, 3 * INTERVAL_MS), /: 0 unpin passes began .*; the guest is static$/);
      await diskWorks(vm);
      assert.ok((await readCounters(agent)).map! > 0);
      assert.deepEqual([lifeOf(vm), pins.framesNow], ["static", frames]);
      return;
    }
    await demand(agent, `${TRACKED}; ${untilDisk}`, "loading the module late");
    assert.equal(lifeOf(vm), "tracked");
    await twoPasses(vm);
    assert.ok(pins.framesNow < frames / 20, `${pins.framesNow} frames are pinned`);
    assert.ok(await eventually(() => pinnedPages() - before < frames / 20, 5000), "the kernel says so too");
    await diskWorks(vm);
  });

for (const frontEnd of FRONT_ENDS)
  test(`frozen: what a driver that has gone leaves is not unpinned, and with its functions reset the guest begins anew: ${frontEnd}`, async (t) => {
    const vm = await bootedVm(t, { frontEnd });
    const crosvm = frontEnd === "crosvm";
    const { agent } = vm.qemu;
    await diskWorks(vm);
    // The disk's driver is bound, and has its rings mapped.
    const driver = `/sys/bus/${crosvm ? "pci" : "virtio"}/drivers/coiommu`;
    const device = (
      await demand(agent, `cd ${driver}; echo ${crosvm ? "0000:*" : "virtio*"}`, "finding our function")
    ).trim();
    await demand(agent, `echo ${device} >${driver}/unbind`, "unbinding our driver");
    assert.equal(lifeOf(vm), "frozen");
    const { framesNow, framesUnpinned } = vm.pins;
    assert.ok(framesNow > 0);
    await sleep(4 * INTERVAL_MS);
    assert.deepEqual(
      [lifeOf(vm), vm.pins.framesNow, vm.pins.framesUnpinned],
      ["frozen", framesNow, framesUnpinned],
    );
    await demand(agent, `echo ${device} >${driver}/bind`, "binding our driver again");
    assert.equal(lifeOf(vm), "tracked");
    await diskWorks(vm);

    await unbindDisk(agent);
    await demand(agent, "rmmod coiommu", "unloading the module");
    assert.ok(await eventually(() => lifeOf(vm) === "undecided"), "no function is left that could write");
    assert.equal(vm.pins.framesNow, 256, "firmware's window");
    await bindDisk(agent);
    await diskWorks(vm);
    await demand(agent, `${TRACKED}${crosvm ? " crosvm=1" : ""}; ${untilDisk}`, "loading the module again");
    assert.equal(lifeOf(vm), "tracked");
    await diskWorks(vm);
  });

test("frozen while fio writes: what is mapped is served, nothing new is pinned, and fio goes on when the driver is back", async (t) => {
  const vm = await bootedVm(t);
  const { agent } = vm.qemu;
  const { pins } = vm;
  const driver = "/sys/bus/virtio/drivers/coiommu";
  const device = (await demand(agent, `cd ${driver}; echo virtio*`, "finding our function")).trim();
  const fio = runFio(agent, parseFioWorkload("fio:rw=randwrite,bs=16k,iodepth=32,seconds=6,size=32M"));
  const { bytes } = vm.disk;
  assert.ok(await eventually(() => vm.disk.bytes > bytes + 2 ** 20, 10_000), "it writes");
  await demand(agent, `echo ${device} >${driver}/unbind`, "unbinding our driver");
  assert.equal(lifeOf(vm), "frozen");
  const frozen = { held: pins.framesNow, pinned: pins.framesPinned, unpinned: pins.framesUnpinned };
  // What had been mapped is served by then; what is to be mapped anew waits.
  let served = -1;
  assert.ok(
    await eventually(async () => {
      const still = served === vm.disk.transfers;
      served = vm.disk.transfers;
      await sleep(500);
      return still;
    }, 10_000),
    "fio waits for mappings",
  );
  await sleep(2 * INTERVAL_MS);
  const { framesNow, framesPinned, framesUnpinned } = pins;
  assert.deepEqual({ held: framesNow, pinned: framesPinned, unpinned: framesUnpinned }, frozen);
  assert.ok(frozen.held > 0);
  assert.deepEqual([lifeOf(vm), vm.disk.transfers, vm.disk.faults, vm.disk.errors], ["frozen", served, 0, 0]);

  await demand(agent, `echo ${device} >${driver}/bind`, "binding our driver again");
  assert.equal(lifeOf(vm), "tracked");
  const { verified, errors } = await fio;
  assert.deepEqual([verified, errors, vm.disk.faults, vm.disk.errors], [true, 0, 0, 0]);
  assert.ok(vm.disk.transfers > served && pins.framesPinned > frozen.pinned, "it has gone on");
  assert.equal((await readCounters(agent)).underflow, 0);
});

test("a machine reset lets go of what a timeout has pinned, and begins anew", async (t) => {
  const vm = await bootedVm(t, { load: false, activationTimeout: milliseconds(500) });
  const { agent, qmp } = vm.qemu;
  await demand(agent, UNTRACKED, "loading the disk's driver alone");
  assert.ok(
    await eventually(
      () => vm.pins.backgroundPinned === vm.pins.backgroundFrames && vm.pins.backgroundFrames > 0,
    ),
  );
  const { framesUnpinned, backgroundFrames } = vm.pins;
  await qmp.execute("set-action", { reboot: "reset" });
  await qmp.execute("system_reset");
  assert.ok(await eventually(() => vm.pins.framesUnpinned - framesUnpinned >= backgroundFrames));
  await comesUpAgain(agent);
  await loadDrivers(agent, await ensureGuest(() => {}), "coiommu");
  assert.equal(lifeOf(vm), "tracked");
  await diskWorks(vm);
});

/** A disk with a kernel and its file system, and a script that puts them where kexec.c looks for them. */
function kexecDisk(folder: string, { kernel, initrd }: { kernel: string; initrd: string }) {
  const file = join(folder, "disk");
  const fd = openSync(file, "w");
  let at = 0;
  const copy = [kernel, initrd].map((path, i) => {
    const bytes = readFileSync(path);
    writeSync(fd, bytes, 0, bytes.length, at * 2 ** 20);
    const megabytes = Math.ceil(bytes.length / 2 ** 20);
    const from = `dd if=/dev/vda bs=1M skip=${at} count=${megabytes} iflag=direct 2>/dev/null`;
    at += megabytes;
    return `${from} | head -c ${bytes.length} >/run/${["kernel", "initrd"][i]}`;
  });
  writeSync(fd, new Uint8Array(1), 0, 1, (at + 16) * 2 ** 20 - 1);
  closeSync(fd);
  return { file, copy: copy.join("; ") };
}

test("kexec: the next kernel uses the disk untracked, and then tracked", async (t) => {
  const folder = scratch(t);
  const guest = await ensureGuest((text) => t.diagnostic(text));
  const { file, copy } = kexecDisk(folder, guest);
  const program = join(folder, "kexec");
  const source = new URL("./kexec.c", import.meta.url).pathname;
  execFileSync("gcc", ["-static", "-nostdlib", "-Os", "-fno-stack-protector", "-s", "-o", program, source]);
  const vm = await bootedVm(t, { disk: { sizeMiB: 0, file } });
  const { agent } = vm.qemu;
  const pinned = vm.pins.framesNow;
  assert.ok(pinned > 0);
  const text = readFileSync(program).toString("base64");
  await demand(
    agent,
    `${copy}; echo ${text} | base64 -d >/run/kexec; chmod +x /run/kexec`,
    "copying the kernel",
  );
  await agent.run("/run/kexec", { timeoutMs: 3000, what: "kexec" }).then(
    ({ code }) => assert.fail(`kexec failed with ${code}`),
    () => {}, // nobody answers any more
  );
  await comesUpAgain(agent);
  await demand(agent, UNTRACKED, "loading the disk's driver alone");
  assert.equal(
    lifeOf(vm),
    "undecided",
    "nobody has turned PIN on, and the first kernel's devices were reset",
  );
  await diskWorks(vm);
  await demand(agent, `${TRACKED}; ${untilDisk}`, "loading the module");
  assert.equal(lifeOf(vm), "tracked");
  await diskWorks(vm);
});

/** What a guest says that boots from the assigned disk, and what was written there. */
async function bootsFromDisk(t: TestContext, beforeActivation: "bios" | "none") {
  const file = join(scratch(t), "disk");
  const { image, sum } = bootImage(64 * 2 ** 20);
  writeFileSync(file, image);
  const vm = await startedVm(t, { beforeActivation, bootFromDisk: true, disk: { sizeMiB: 0, file } });
  return { vm, sum, written: () => writtenSum(readFileSync(file)) };
}

test("firmware boots from the assigned disk, reads and writes it, without a fault", async (t) => {
  const { vm, sum, written } = await bootsFromDisk(t, "bios");
  assert.ok(await eventually(() => vm.qemu.console().includes(SAYS_DONE), 60_000), vm.qemu.console());
  assert.equal(written(), sum);
  assert.deepEqual([vm.disk.faults, vm.disk.errors, lifeOf(vm)], [0, 0, "undecided"]);
  assert.ok(vm.disk.bytes >= 32 * 1024);
  assert.ok(
    vm.pins.framesFirmware > 256,
    "its rings lie beyond the window: they were pinned when they were touched",
  );
});

test("with nothing pinned before the driver, the same firmware meets faults, and boots nothing", async (t) => {
  const { vm, written } = await bootsFromDisk(t, "none");
  assert.ok(await eventually(() => vm.disk.faults > 0, 60_000));
  await sleep(2000);
  assert.deepEqual([vm.qemu.console().includes(SAYS_DONE), written(), vm.pins.framesNow], [false, 0, 0]);
});
