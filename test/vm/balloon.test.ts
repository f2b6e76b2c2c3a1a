/** QEMU's balloon: what is in it is not pinned, and what is mapped meanwhile is not lost. */
import assert from "node:assert/strict";
import { readdirSync, readlinkSync, statSync } from "node:fs";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { rangesOf } from "../../src/base/ranges.ts";
import { milliseconds } from "../../src/base/units.ts";
import { ApiServer } from "../../src/control/api/server.ts";
import { Attachment } from "../../src/control/attach.ts";
import type { Resized } from "../../src/control/balloon.ts";
import { demand, readCounters } from "../../src/control/guest-side.ts";
import type { MachineOptions } from "../../src/control/machine.ts";
import type { Vm } from "../../src/control/vm.ts";
import type { GuestAgent } from "../../src/machine/qemu/agent.ts";
import { runFio } from "../../src/machine/qemu/fio.ts";
import type { Qmp } from "../../src/machine/qemu/qmp.ts";
import { parseFioWorkload } from "../../src/machine/workload-text.ts";
import { ask, socketPath } from "../support/api.ts";
import { eventually } from "../support/eventually.ts";
import { bootedVm, INTERVAL_MS, pinnedPages } from "./support.ts";
import { blockDevice, userVm } from "./user-qemu.ts";

const MIB = 2 ** 20;
const ALL = 512;
const SOME = 448;
const HALF = 256;
const DISK = 384;
/** Linux include/uapi/linux/kernel-page-flags.h: of a page that a balloon has, since Linux 5.0. */
const KPF_OFFLINE = 1n << 23n;

/** Frames that the guest's kernel says are in its balloon. */
async function ballooned(agent: GuestAgent): Promise<number[]> {
  const text = await demand(agent, "base64 /proc/kpageflags", "reading the flags of pages");
  const raw = Buffer.from(text, "base64");
  const flags = new BigUint64Array(raw.buffer.slice(raw.byteOffset, raw.byteOffset + (raw.length & ~7)));
  return [...flags.keys()].filter((gfn) => (flags[gfn]! & KPF_OFFLINE) !== 0n);
}

/** Force-unpin just these frames, as a VMM does before it discards them. Returns how many were pinned. */
async function unpin({ operator }: Vm, gfns: readonly number[]): Promise<number> {
  const ranges = rangesOf(gfns);
  let found = 0;
  for (let i = 0; i < ranges.length; i += 2) {
    const [first, end] = [ranges[i]!, ranges[i]! + ranges[i + 1]!];
    const { unpinned, stayed } = await operator.unpinIdle({ first, end });
    assert.equal(stayed, 0, "nobody maps what is in the balloon");
    found += unpinned;
  }
  return found;
}

/** MiB of the guest's RAM that the host keeps memory for, by the file itself. */
function residentMiB({ qemu: { pid } }: Vm): number {
  const files = readdirSync(`/proc/${pid}/fd`).map((fd) => `/proc/${pid}/fd/${fd}`);
  const link = (file: string) => {
    try {
      return readlinkSync(file);
    } catch {
      return ""; // it has been closed
    }
  };
  const ram = files.find((file) => link(file).startsWith("/memfd:memory-backend"))!;
  return (statSync(ram).blocks * 512) / MIB;
}

const actualMiB = async (qmp: Qmp): Promise<number> =>
  (await qmp.execute<{ actual: number }>("query-balloon")).actual / MIB;

/** By somebody who knows nothing of coIOMMU. */
async function balloonByHand(qmp: Qmp, mib: number): Promise<void> {
  await qmp.execute("balloon", { value: mib * MIB });
  assert.ok(await eventually(async () => (await actualMiB(qmp)) === mib, 20_000), "the guest's driver works");
}

/** QEMU may tell of the last change a second late. */
const told = () => sleep(2000);

const fio = ({ qemu }: Vm, seconds: number) =>
  runFio(qemu.agent, parseFioWorkload(`fio:rw=randwrite,bs=16k,iodepth=16,size=16M,seconds=${seconds}`));

/** Most of the guest's memory becomes page cache that the disk has written, so it is pinned. */
const fill = (agent: GuestAgent) =>
  demand(agent, "dd if=/dev/vda of=/dev/null bs=256k; echo 1 >/proc/sys/vm/drop_caches", "reading");

test("half of the memory goes to the host and comes back while the disk is written: nothing is lost", async (t) => {
  // What is unpinned is so because of the balloon.
  const vm = await bootedVm(t, { policy: "off", disk: { sizeMiB: DISK }, memoryMiB: ALL });
  const { balloon, operator, pins } = vm;
  await fill(vm.qemu.agent);
  assert.ok(pins.framesNow > (DISK * MIB) / 4096);

  // Parked, frames of the balloon stay pinned; the check that is relied on below says so.
  await operator.park(true);
  await assert.rejects(balloon.resize(HALF), /parked/);
  assert.equal(await actualMiB(vm.qemu.qmp), ALL, "refused before the guest is told");
  await balloonByHand(vm.qemu.qmp, SOME);
  await told();
  await operator.park(false);
  const some = await ballooned(vm.qemu.agent);
  assert.ok(some.length >= ((ALL - SOME) * MIB) / 4096);
  assert.ok((await unpin(vm, some)) > 0);

  const held = pins.framesNow;
  const before = { resident: residentMiB(vm), pages: pinnedPages() };
  const working = fio(vm, 4);
  const shrunk = await balloon.resize(HALF);
  assert.deepEqual([shrunk.memoryMiB, shrunk.stayed], [HALF, 0]);
  const { verified, errors } = await working;
  assert.deepEqual([verified, errors, vm.disk.faults], [true, 0, 0]);
  const after = { resident: residentMiB(vm), pages: pinnedPages() };
  t.diagnostic(`${held} frames were pinned; ${JSON.stringify({ shrunk, before, after })}`);
  assert.equal(await unpin(vm, await ballooned(vm.qemu.agent)), 0, "nothing in the balloon is pinned");
  assert.ok(before.resident - after.resident > 0.8 * (SOME - HALF), "the memory is the host's again");
  assert.ok(before.pages - after.pages > 0.8 * shrunk.unpinned, "no pin keeps it");

  const grown = await balloon.resize(ALL);
  assert.deepEqual([grown.memoryMiB, grown.stayed], [ALL, 0]);
  const requests = pins.pinRequests;
  const [again] = await Promise.all([fio(vm, 2), fill(vm.qemu.agent)]);
  assert.deepEqual([again.verified, again.errors, vm.disk.faults], [true, 0, 0]);
  assert.ok(pins.pinRequests > requests, "what comes out of the balloon is asked for again");

  const unpinned = pins.framesUnpinned;
  await balloonByHand(vm.qemu.qmp, HALF);
  const frames = await ballooned(vm.qemu.agent);
  assert.ok(frames.length >= ((ALL - HALF) * MIB) / 4096);
  await told();
  assert.ok(pins.framesUnpinned > unpinned);
  assert.equal(await unpin(vm, frames), 0, "to hear of the change is enough");
  const counters = await readCounters(vm.qemu.agent);
  assert.deepEqual([counters.underflow, counters.pin_refused, vm.disk.faults], [0, 0, 0]);
});

test("PUT /v1/balloon: the guest is left so much, what it gave is not pinned, and its memory is the host's", async (t) => {
  const vm = await bootedVm(t, { policy: "off", disk: { sizeMiB: DISK }, memoryMiB: ALL });
  await fill(vm.qemu.agent);
  const path = socketPath(t);
  const api = await ApiServer.listen(path, (text) => assert.fail(text));
  t.after(() => api.close());
  api.guest = { machine: vm, options: { strategy: "coiommu" } as MachineOptions };
  const pinned = async () => ((await ask(path, "GET", "/v1/state")).body as { pinned: number }).pinned;
  const resize = async (memoryMiB: number) => {
    const { status, body } = await ask(path, "PUT", "/v1/balloon", { memoryMiB });
    assert.equal(status, 200, JSON.stringify(body));
    return body as Resized;
  };
  const before = { pinned: await pinned(), resident: residentMiB(vm), pages: pinnedPages() };
  const shrunk = await resize(HALF);
  const after = { pinned: await pinned(), resident: residentMiB(vm), pages: pinnedPages() };
  t.diagnostic(JSON.stringify({ shrunk, before, after }));
  assert.deepEqual([shrunk.memoryMiB, shrunk.stayed], [HALF, 0]);
  // The guest reads a little meanwhile.
  assert.ok(before.pinned - after.pinned > 0.9 * shrunk.unpinned && shrunk.unpinned > 0);
  assert.ok(before.pages - after.pages > 0.8 * shrunk.unpinned, "the kernel says so too");
  assert.ok(before.resident - after.resident > 0.8 * (ALL - HALF));
  const grown = await resize(ALL);
  assert.deepEqual([grown.memoryMiB, grown.stayed], [ALL, 0]);
  const { verified, errors } = await fio(vm, 1);
  assert.deepEqual([verified, errors, vm.disk.faults], [true, 0, 0]);
});

test("attached to a QEMU of somebody else, whose balloon somebody else fills", async (t) => {
  const vm = await userVm(t, "pc", ["-device", "virtio-balloon-pci"]);
  const attachment = await Attachment.start({
    qmp: vm.qmp,
    assigned: [],
    disks: [{ sizeMiB: DISK }],
    policy: "off",
    activationTimeout: Number.POSITIVE_INFINITY,
    interval: milliseconds(INTERVAL_MS),
    pinner: "io_uring",
    quota: () => Number.POSITIVE_INFINITY,
    onWarning: (text) => assert.fail(text),
  });
  t.after(() => attachment.close());
  const load = "modprobe virtio_pci; modprobe virtio_blk; modprobe virtio_balloon; modprobe coiommu";
  await demand(vm.agent, `${load}; ${blockDevice("vda")}`, "loading the drivers");
  await fill(vm.agent);
  const before = { held: attachment.pins.framesNow, pages: pinnedPages() };
  await balloonByHand(vm.control, HALF);
  await told();
  const after = { held: attachment.pins.framesNow, pages: pinnedPages() };
  t.diagnostic(JSON.stringify({ before, after }));
  const half = (HALF * MIB) / 4096;
  assert.ok(before.held > half && after.held <= half, "half of all frames are in the balloon");
  assert.equal(before.pages - after.pages, before.held - after.held);
  await balloonByHand(vm.control, ALL);
  await fill(vm.agent);
  assert.equal(attachment.devices[0]!.faults, 0);
});
