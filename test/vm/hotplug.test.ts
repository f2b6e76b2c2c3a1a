/** Disks that come and go, and one that dies. */
import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { type TestContext, test } from "node:test";
import { type Bdf, formatBdf, milliseconds, parseBdf } from "../../src/base/units.ts";
import { Attachment, type AttachOptions } from "../../src/control/attach.ts";
import { demand, loadDrivers, readCounters, unbindDisk } from "../../src/control/guest-side.ts";
import type { PluggedDisks } from "../../src/control/plugged-disks.ts";
import type { GuestAgent } from "../../src/machine/qemu/agent.ts";
import { runFio } from "../../src/machine/qemu/fio.ts";
import { ensureGuest } from "../../src/machine/qemu/guest.ts";
import { pciFunctions } from "../../src/machine/qemu/hotplug.ts";
import type { Qmp } from "../../src/machine/qemu/qmp.ts";
import { parseFioWorkload } from "../../src/machine/workload-text.ts";
import { ask } from "../support/api.ts";
import { Cli } from "../support/cli.ts";
import { eventually } from "../support/eventually.ts";
import { bootedVm, comesUpAgain, INTERVAL_MS, pinnedPages, twoPasses } from "./support.ts";
import { blockDevice, image, scratch, type UserVm, userVm } from "./user-qemu.ts";

async function attached(
  t: TestContext,
  { qmp }: UserVm,
  overrides: Partial<AttachOptions> = {},
): Promise<Attachment> {
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
    ...overrides,
  });
  t.after(() => attachment.close());
  return attachment;
}

const plugged = async (disks: PluggedDisks, sizeMiB: number) => disks.plug(await disks.open({ sizeMiB }));

const faults = ({ devices }: Pick<Attachment, "devices">) => devices.reduce((sum, d) => sum + d.faults, 0);

/** What `device_add` takes for the place where a function is. */
async function placeAt(qmp: Pick<Qmp, "execute">, bdf: Bdf): Promise<Record<string, string>> {
  if (bdf >> 8 === 0) return { addr: (bdf >> 3).toString(16) };
  type Bus = { devices: { qdev_id: string; pci_bridge?: { bus: { secondary: number } } }[] };
  const [root] = await qmp.execute<Bus[]>("query-pci");
  const port = root!.devices.find(({ pci_bridge }) => pci_bridge?.bus.secondary === bdf >> 8);
  return { bus: port!.qdev_id, addr: "0" };
}

/** A guest with our drivers loaded and a first disk of ours, vda, that takes more. */
interface Plugging extends Pick<Attachment, "devices" | "disks" | "pins"> {
  readonly agent: GuestAgent;
  readonly qmp: Pick<Qmp, "execute">;
  /** Have the guest let go of the first disk. */
  unplugFirst(): Promise<unknown>;
  /** Frames that stay pinned when nothing is mapped. */
  stays(): number;
  detach(): Promise<unknown>;
}

async function attachedPlugging(t: TestContext): Promise<Plugging> {
  const vm = await userVm(t, "pc");
  const { agent, control } = vm;
  const attachment = await attached(t, vm);
  const { devices, disks, pins } = attachment;
  const first = await plugged(disks, 64);
  const load = `modprobe virtio_pci; modprobe virtio_blk; modprobe coiommu; ${blockDevice("vda")}`;
  await demand(agent, load, "loading the drivers");
  return {
    ...{ agent, qmp: control, devices, disks, pins, stays: () => 0 },
    unplugFirst: async () => assert.ok(await disks.unplug(first, 10_000), "the guest lets go of it"),
    detach: async () => assert.deepEqual(await attachment.detach(10_000), []),
  };
}

async function crosvmPlugging(t: TestContext): Promise<Plugging> {
  const vm = await bootedVm(t, { hotplug: true, frontEnd: "crosvm" });
  const { disks, pins, qemu } = vm;
  return {
    ...{ agent: qemu.agent, qmp: qemu.qmp, disks, pins },
    get devices() {
      return vm.devices;
    },
    unplugFirst: () => unbindDisk(qemu.agent),
    // No driver can say that its table is complete.
    stays: () => pins.framesFirmware,
    detach: () => vm.close(),
  };
}

for (const [where, started] of [
  ["attached", attachedPlugging],
  ["crosvm", crosvmPlugging],
] as const) {
  test(`a disk that is plugged and unplugged while another works is tracked, and leaves no pin: ${where}`, async (t) => {
    const before = pinnedPages();
    const guest = await started(t);
    const { agent, disks, pins } = guest;
    const fio = runFio(agent, parseFioWorkload("fio:rw=randwrite,bs=4k,iodepth=16,seconds=6,size=16M"));
    const mapped = async () => (await readCounters(agent)).live_frames!;
    const second = await plugged(disks, 32);
    await demand(agent, blockDevice("vdb"), "waiting for the second disk");
    const both = await mapped();
    await demand(
      agent,
      "dd if=/dev/vdb of=/dev/null bs=64k count=256 iflag=direct",
      "reading the second disk",
    );
    assert.ok(guest.devices[1]!.bytes >= 16 * 2 ** 20, "the second disk has served what was read");
    assert.ok(await disks.unplug(second, 10_000), "the guest lets go of it");
    const written = await fio;
    assert.deepEqual([written.verified, written.errors, faults(guest)], [true, 0, 0]);
    assert.ok((await mapped()) < both, "what the second disk had mapped is not");

    await guest.unplugFirst();
    const idle = await readCounters(agent);
    assert.deepEqual([idle.live_frames, idle.underflow, idle.pin_refused], [0, 0, 0]);
    assert.ok(await eventually(() => pins.framesNow <= guest.stays(), 5000), "all frames are unpinned");
    assert.ok(
      await eventually(() => pinnedPages() - before === pins.framesNow, 5000),
      "the kernel counts no other pin any more",
    );
    await guest.detach();
  });

  test(`what is plugged where a disk of ours was is not tracked: ${where}`, async (t) => {
    const { agent, qmp, disks } = await started(t);
    const disk = await plugged(disks, 32);
    await demand(agent, blockDevice("vdb"), "waiting for the disk");
    const place = await placeAt(qmp, disks.bdfOf(disk)!);
    // By the person, not by us.
    await qmp.execute("device_del", { id: disk });
    assert.ok(await eventually(() => disks.bdfOf(disk) === undefined, 10_000), "we hear that it is gone");

    const before = await readCounters(agent);
    await qmp.execute("blockdev-add", { driver: "null-co", "node-name": "other", size: 2 ** 24 });
    await qmp.execute("device_add", { driver: "nvme", serial: "x", drive: "other", ...place });
    await demand(agent, blockDevice("nvme0n1"), "waiting for the other disk");
    await demand(agent, "dd if=/dev/nvme0n1 of=/dev/null bs=64k count=16 iflag=direct", "reading it");
    const after = await readCounters(agent);
    assert.deepEqual([after.map, after.pin_refused], [before.map, 0]);
  });
}

test("a function of QEMU's that goes and comes back is tracked, where it was and elsewhere", async (t) => {
  const blockdev = ["-blockdev", "driver=null-co,node-name=other,size=67108864"];
  const nvme = { driver: "nvme", id: "other", drive: "other", serial: "x" };
  const vm = await userVm(t, "pc", [...blockdev, "-device", "nvme,id=other,drive=other,serial=x,addr=5"]);
  const { agent, control } = vm;
  const notes: string[] = [];
  const attachment = await attached(t, vm, {
    ...{ assigned: [parseBdf("00:05.0") as Bdf], onWarning: (text: string) => notes.push(text) },
  });
  const there = async () => (await pciFunctions(control)).some(({ id }) => id === "other");
  const goes = async () => {
    await control.execute("device_del", { id: "other" });
    assert.ok(await eventually(async () => !(await there()), 10_000), "the guest lets go of it");
    assert.equal((await readCounters(agent)).live_frames, 0, "and unmaps all");
    assert.ok(await eventually(() => attachment.pins.framesNow === 0, 5000), "so nothing is pinned");
  };
  const isTracked = async () => {
    await demand(agent, blockDevice("nvme0n1"), "waiting for it");
    const before = await readCounters(agent);
    await demand(agent, "dd if=/dev/nvme0n1 of=/dev/null bs=64k count=32 iflag=direct", "reading it");
    const after = await readCounters(agent);
    assert.ok(after.map! >= before.map! + 32, "its mappings are tracked");
    assert.equal(after.pin_refused, 0);
  };
  await demand(agent, "modprobe virtio_pci; modprobe coiommu", "loading ours");
  await isTracked();
  await goes();
  await control.execute("device_add", { ...nvme, addr: "5" });
  await isTracked();
  assert.deepEqual(notes, []);

  await goes();
  await control.execute("device_add", { ...nvme, addr: "9" });
  assert.ok(await eventually(() => notes.length > 0, 5000), "we see where it is");
  assert.match(notes.join(), /^other, which was 0000:00:05\.0, is 0000:00:09\.0 now/);
  await demand(agent, blockDevice("nvme0n1"), "waiting for it");
  // As we have said, because it may have been quicker.
  const driver = "/sys/bus/pci/drivers/nvme";
  const again = `echo 0000:00:09.0 >${driver}/unbind; echo 0000:00:09.0 >${driver}/bind`;
  await demand(agent, again, "binding its driver again");
  await isTracked();
});

interface Counters {
  readonly tracking: { readonly framesNow: number };
  readonly devices: readonly { readonly endpoint: string; readonly bytes: number; readonly faults: number }[];
}

test("a VM of `run` is given a disk and loses it through the API; its driver is tracked, and nothing stays pinned", async (t) => {
  const folder = scratch(t);
  const [api, json, script] = [join(folder, "api"), join(folder, "result.json"), join(folder, "script")];
  const read = "dd if=/dev/vdb of=/dev/null bs=64k iflag=direct";
  const untilGone = "i=0; while [ -b /dev/vdb ] && [ $i -lt 600 ]; do i=$((i+1)); usleep 50000; done";
  writeFileSync(script, `${blockDevice("vdb")} && ${read} && ${untilGone}; [ ! -b /dev/vdb ]`);
  const command = ["run", "--machine", "qemu", "--memory", "512M", "--interval", "300ms"];
  const cli = new Cli([...command, "--workload", `script:${script}`, "--api", api, "--json", json]);
  t.after(() => cli.child.kill("SIGKILL"));
  await cli.said("running script");
  const send = async (method: string, path: string, body?: unknown) => await ask(api, method, path, body);
  const counters = async () => (await send("GET", "/v1/counters")).body as Counters;

  const absent = await send("POST", "/v1/plug", { file: join(folder, "absent") });
  assert.deepEqual([absent.status, /does not exist/.test(JSON.stringify(absent.body))], [409, true]);
  const plugged = await send("POST", "/v1/plug", { file: image(folder, "disk", 16) });
  assert.equal(plugged.status, 200, JSON.stringify(plugged.body));
  const { id, endpoint } = plugged.body as { id: string; endpoint: string };
  const all = 16 * 2 ** 20;
  const served = async () => (await counters()).devices.find((d) => d.endpoint === endpoint)!.bytes;
  assert.ok(await eventually(async () => (await served()) >= all, 30_000), "the guest reads all of it");
  assert.equal(
    (await send("POST", "/v1/unplug", { id: "disk" })).status,
    400,
    "what was there from the start",
  );
  const gone = await send("POST", "/v1/unplug", { id });
  assert.deepEqual([gone.status, gone.body], [200, { gone: true }]);
  assert.deepEqual(
    (await counters()).devices.map((d) => [d.endpoint, d.faults]),
    [["0000:00:04.0", 0]],
  );
  const { code, stderr } = await cli.ended;
  assert.equal(code, 0, stderr);
  const { dma, maps, pins } = JSON.parse(readFileSync(json, "utf8"));
  assert.deepEqual([dma.faults, maps.liveAtEnd, pins.refused], [0, 0, 0]);
  assert.ok(dma.bytes >= all && maps.map >= all / 65_536, "what has gone is counted too");
});

test("a disk whose thread dies in the middle of a DMA harms no other; the reset that frees its guest lets go of its pins", async (t) => {
  const before = pinnedPages();
  const told: string[] = [];
  const vm = await bootedVm(t, {
    ...{ hotplug: true, deviceEntry: new URL("./dying-disk.ts", import.meta.url) },
    onWarning: (text) => told.push(text),
  });
  const { agent, qmp } = vm.qemu;
  const { disks, pins } = vm;
  const id = await disks.plug(await disks.open({ sizeMiB: 64 }));
  await demand(agent, blockDevice("vdb"), "waiting for the second disk");
  const fio = runFio(agent, parseFioWorkload("fio:rw=randwrite,bs=4k,iodepth=16,seconds=5,size=16M"));
  const reading = "dd if=/dev/vdb of=/dev/null bs=64k iflag=direct >/dev/null 2>&1 &";
  await demand(agent, reading, "reading the second disk");
  assert.ok(await eventually(() => told.length > 0, 20_000), "it dies, with requests under way");
  assert.match(
    told.join(),
    new RegExp(`^${id} serves the VM no longer, which goes on without it: the disk has`),
  );
  const written = await fio;
  assert.deepEqual([written.verified, written.errors, vm.disk.faults], [true, 0, 0]);

  const held = (await readCounters(agent)).live_frames!;
  await twoPasses(vm);
  await twoPasses(vm);
  const { live_frames, underflow, pin_refused } = await readCounters(agent);
  assert.deepEqual(
    [live_frames, underflow, pin_refused],
    [held, 0, 0],
    "its guest has not unmapped anything",
  );
  assert.ok(
    await eventually(() => pins.framesNow <= held + 16, 5000),
    `what nobody maps is unpinned: ${pins.framesNow} pinned, ${held} mapped`,
  );

  // Its driver waits for the requests that died with the disk.
  assert.equal(await disks.unplug(id, 2000), false);
  await qmp.execute("set-action", { reboot: "reset" });
  await qmp.execute("system_reset");
  assert.ok(await eventually(() => disks.ids.length === 0, 20_000), "the reset ends what the guest has not");
  await comesUpAgain(agent);
  await loadDrivers(agent, await ensureGuest(() => {}), "coiommu");
  assert.deepEqual(vm.assigned.length, 1);
  const again = await runFio(agent, parseFioWorkload("fio:rw=randwrite,bs=4k,iodepth=8,seconds=1,size=8M"));
  assert.deepEqual([again.verified, again.errors, vm.disk.faults], [true, 0, 0]);
  await vm.close();
  assert.ok(await eventually(() => pinnedPages() === before, 5000), "the kernel counts no pin any more");
});

/**
 * Slot Control of the port above a function: power and its indicator off. Then QEMU takes the function away, whatever its
 * driver is doing. The register is in the PCI Express capability (10h), at 18h.
 */
const turnSlotOff = (bdf: string) => `c=$(readlink -f /sys/bus/pci/devices/${bdf})/../config
byte() { hexdump -v -s $1 -n 1 -e '1/1 "%d"' $c; }
p=$(byte 52); while [ $(byte $p) -ne 16 ]; do p=$(byte $((p+1))); done
off=$(printf '\\\\%03o\\\\%03o' $(byte $((p+24))) $(($(byte $((p+25)))|7)))
printf "$off" | dd of=$c bs=2 seek=$((p/2+12)) conv=notrunc 2>/dev/null`;

test("PCIe hot-plug: a disk comes and goes; one that vanishes under its driver harms no other, and the reset that frees its guest lets go of its pins", async (t) => {
  const before = pinnedPages();
  const port = (n: number) => ["-device", `pcie-root-port,id=port${n},chassis=${n},slot=${n}`];
  const native = ["-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"];
  const vm = await userVm(t, "q35", [...native, ...[1, 2, 3].flatMap(port)]);
  const { agent, control } = vm;
  const attachment = await attached(t, vm);
  const { disks, pins } = attachment;
  const load = `modprobe virtio_pci; modprobe virtio_blk; modprobe coiommu; ${blockDevice("vda")}`;
  await plugged(disks, 64);
  await demand(agent, load, "loading the drivers");
  const second = await plugged(disks, 32);
  await demand(agent, `${blockDevice("vdb")} && dd if=/dev/vdb of=/dev/null bs=64k count=64`, "reading it");
  assert.ok(await disks.unplug(second, 20_000), "5 s after the button was pressed, the guest lets go of it");
  await demand(agent, "dmesg | grep 'pciehp: Slot.*Attention button pressed'", "looking who has done it");

  const third = await plugged(disks, 32);
  await demand(agent, blockDevice("vdb"), "waiting for the third disk");
  const fio = runFio(agent, parseFioWorkload("fio:rw=randwrite,bs=4k,iodepth=16,seconds=4,size=16M"));
  const reading = "while dd if=/dev/vdb of=/dev/null bs=64k iflag=direct; do :; done >/dev/null 2>&1 &";
  await demand(agent, reading.repeat(2), "reading the third disk");
  assert.ok(await eventually(() => attachment.devices[2]!.bytes > 2 ** 20), "it is busy");
  await demand(agent, turnSlotOff(formatBdf(disks.bdfOf(third)!)), "turning its slot off");
  assert.ok(await eventually(() => disks.bdfOf(third) === undefined, 5000), "QEMU has it no longer");
  const written = await fio;
  assert.deepEqual([written.verified, written.errors, faults(attachment)], [true, 0, 0]);
  const { live_frames, underflow, pin_refused } = await readCounters(agent);
  assert.deepEqual([underflow, pin_refused], [0, 0]);
  assert.ok(
    await eventually(() => pins.framesNow <= live_frames! + 16, 5000),
    "what nobody maps is unpinned",
  );

  await control.execute("system_reset");
  await comesUpAgain(agent);
  await demand(agent, load, "loading the drivers again");
  const again = await runFio(agent, parseFioWorkload("fio:rw=randwrite,bs=4k,iodepth=8,seconds=1,size=8M"));
  assert.deepEqual([again.verified, again.errors, faults(attachment)], [true, 0, 0]);
  const idle = (await readCounters(agent)).live_frames!;
  assert.ok(await eventually(() => pins.framesNow <= idle, 5000), "what the third disk had pinned is not");
  await attachment.close();
  assert.ok(await eventually(() => pinnedPages() === before, 5000), "the kernel counts no pin any more");
});
