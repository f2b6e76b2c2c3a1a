/** A real guest whose disk is remapped: by all of a strategy's means, and from one driver of the disk to the next. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { demand, readCounters, unbindDisk } from "../../src/control/guest-side.ts";
import type { Vm } from "../../src/control/vm.ts";
import { runFio } from "../../src/machine/qemu/fio.ts";
import { ensureGuest } from "../../src/machine/qemu/guest.ts";
import { parseFioWorkload } from "../../src/machine/workload-text.ts";
import { eventually } from "../support/eventually.ts";
import { type Twin, writeTwins } from "./broken-modules.ts";
import { bootedVm, pinnedPages, twoPasses } from "./support.ts";

const REMAP = "/sys/kernel/debug/coiommu/remap";
const DISK = "0000:00:04.0";
const BIND = `echo ${DISK} >/sys/bus/pci/drivers/virtio-pci/bind
i=0; while [ ! -b /dev/vda ]; do i=$((i+1)); [ $i -lt 100 ] || exit 1; usleep 50000; done`;

const work = ({ qemu }: Vm, text: string) => runFio(qemu.agent, parseFioWorkload(text));
const WRITE = "fio:rw=randwrite,bs=4k,iodepth=16,seconds=2,size=8M";
const MIXED = "fio:rw=randwrite,bs=48k,iodepth=8,seconds=1,size=8M";

for (const strategy of ["viommu-strict", "viommu-lazy"] as const)
  test(`${strategy}: nothing is lost, nothing faults, and nothing is left`, async (t) => {
    const before = pinnedPages();
    const vm = await bootedVm(t, { strategy });
    const { agent } = vm.qemu;
    for (const text of [WRITE, MIXED]) {
      const { verified, errors, ops } = await work(vm, text);
      assert.deepEqual([verified, errors], [true, 0]);
      assert.ok(ops > 0);
    }
    await unbindDisk(agent);
    const c = await readCounters(agent);
    assert.equal(c.pin_requests, 0);
    assert.ok(c.map_requests! >= c.map!, "each mapping is a MAP at least");
    assert.ok(c.unmap_requests! >= c.unmap!, "one that a busy device delays is made again");
    assert.deepEqual([c.unmap, c.frames_unmapped], [c.map, c.frames_mapped]);
    const failures = ["map_failed", "map_refused", "iova_failed", "iova_leaked", "remap_off", "remap_lost"];
    assert.deepEqual(
      failures.filter((name) => c[name] !== 0),
      [],
    );
    assert.deepEqual([vm.disk.faults, vm.disk.errors, c.hooked], [0, 0, 0]);
    const perUnmap = c.kicks! - c.map_requests!;
    if (strategy === "viommu-lazy") assert.ok(perUnmap < c.unmap_requests! / 5, "UNMAPs go together");
    else assert.ok(perUnmap >= c.unmap_requests!, "each UNMAP leaves the guest");

    await twoPasses(vm);
    assert.equal(vm.pins.framesNow, 0, "what domains had pinned is not");
    assert.equal(vm.pins.framesPinned, vm.pins.framesUnpinned);
    assert.ok(await eventually(() => pinnedPages() === before, 5000), "the kernel counts no pin any more");
  });

test("a lazy UNMAP does not wait for another unmap", async (t) => {
  const vm = await bootedVm(t, { strategy: "viommu-lazy" });
  const { agent } = vm.qemu;
  await demand(agent, "dd if=/dev/vda of=/dev/null bs=4k count=4 iflag=direct", "reading a little");
  await sleep(500);
  const c = await readCounters(agent);
  assert.ok(c.unmap! > 0 && c.unmap! < 250, "no queue is full");
  assert.ok(await eventually(async () => (await readCounters(agent)).unmap_requests === c.unmap, 2000));
});

test("a disk moves between tracking and remapping from driver to driver, and its pins follow", async (t) => {
  const vm = await bootedVm(t);
  const { agent } = vm.qemu;
  const sound = async () => {
    const { verified, errors } = await work(vm, WRITE);
    assert.deepEqual([verified, errors, vm.disk.faults], [true, 0, 0]);
    return await readCounters(agent);
  };
  const state = async () => (await demand(agent, `cat ${REMAP}`, "asking how")).trim();

  const tracked = await sound();
  assert.deepEqual([await state(), tracked.map_requests], [`${DISK} tracked`, 0]);
  const { code } = await agent.run(`echo ${DISK} on >${REMAP}`, { timeoutMs: 5000, what: "switching" });
  assert.notEqual(code, 0, "not while a driver is bound");
  assert.equal(await state(), `${DISK} tracked`);

  await unbindDisk(agent);
  await demand(agent, `echo ${DISK} on >${REMAP} && ${BIND}`, "remapping the disk");
  const idle = await readCounters(agent);
  assert.equal(idle.live_refs, 0, "its rings are not in the table");
  const remapped = await sound();
  assert.equal(await state(), `${DISK} remapped`);
  assert.equal(remapped.pin_requests, idle.pin_requests);
  assert.ok(remapped.map_requests! > 100);
  await twoPasses(vm);
  const held = vm.pins.framesNow;
  assert.ok(held > 0 && held < 20, `only its rings are pinned: ${held}`);

  await unbindDisk(agent);
  await demand(agent, `echo ${DISK.slice(5)} off >${REMAP} && ${BIND}`, "tracking the disk again");
  const again = await sound();
  assert.equal(await state(), `${DISK} tracked`);
  assert.ok(again.pin_requests! > remapped.pin_requests!);
  assert.equal(again.iova_leaked, 0);
  await unbindDisk(agent);
  await twoPasses(vm);
  assert.deepEqual([vm.pins.framesNow, (await readCounters(agent)).live_refs], [0, 0]);
});

test("what is no function, or no word, is refused", async (t) => {
  const vm = await bootedVm(t);
  const { agent } = vm.qemu;
  await unbindDisk(agent);
  const lines = ["", DISK, `${DISK} perhaps`, "0001:00:04.0 on", "00:20.0 on", "00:04.8 on", `${DISK}x on`];
  const script = `for l in ${lines.map((line) => `'${line}'`).join(" ")}; do
(echo "$l" >${REMAP}) 2>/dev/null && echo "taken: $l"; done
rmmod coiommu; modprobe coiommu remap=${DISK},vda 2>/dev/null && echo loaded; true`;
  assert.equal(await demand(agent, script, "writing what is wrong"), "");
});

test("a disk without tracking and without its domain reaches nothing of what it is told", async (t) => {
  const vm = await bootedVm(t, {
    strategy: "viommu-strict",
    backendEntry: new URL("./domainless-backend.ts", import.meta.url),
    load: false,
  });
  const { agent } = vm.qemu;
  const load = "modprobe coiommu remap=all; modprobe virtio_pci; (modprobe virtio_blk &) >/dev/null 2>&1";
  await agent.run(load, { timeoutMs: 10_000, what: "loading the drivers" });
  assert.ok(await eventually(() => vm.disk.faults > 0, 10_000), "its addresses are not the frames'");
});

test("a remapped disk whose IOMMU goes away and comes back is bound again, and works", async (t) => {
  const vm = await bootedVm(t, { strategy: "viommu-strict" });
  const { agent } = vm.qemu;
  const driver = "/sys/bus/virtio/drivers/coiommu";
  const script = `d=$(basename $(ls -d ${driver}/virtio*))
echo $d >${driver}/unbind && cat ${REMAP} && echo $d >${driver}/bind && cat ${REMAP}
i=0; while [ ! -b /dev/vda ]; do i=$((i+1)); [ $i -lt 100 ] || exit 1; usleep 50000; done`;
  assert.equal(await demand(agent, script, "taking the IOMMU away"), `${DISK} remapped\n${DISK} remapped\n`);
  const { verified, errors } = await work(vm, WRITE);
  assert.deepEqual([verified, errors, vm.disk.faults], [true, 0, 0]);
});

for (const strategy of ["viommu-strict", "viommu-lazy"] as const)
  for (const every of [100, 1])
    test(`${strategy}: an address whose UNMAP is refused is not used again, one in ${every}`, async (t) => {
      process.env.COIOMMU_TEST_REFUSED = String(every);
      const backendEntry = new URL("./refusing-backend.ts", import.meta.url);
      const vm = await bootedVm(t, { strategy, backendEntry });
      const { agent } = vm.qemu;
      const { verified, errors } = await work(vm, MIXED);
      assert.deepEqual([verified, errors, vm.disk.faults], [true, 0, 0]);
      const c = await readCounters(agent);
      assert.ok(c.unmap_refused! > 0);
      assert.equal(c.map_refused, 0, "no address was mapped twice");
      assert.equal(c.iova_leaked! > 0, every === 1, "what succeeds in the end is free again");
      // The domain goes as a whole, and with it what was not unmapped.
      await unbindDisk(agent);
      await twoPasses(vm);
      assert.equal(vm.pins.framesNow, 0);
    });

const TWINS: readonly (Twin & { readonly shows: (vm: Vm) => Promise<boolean> })[] = [
  {
    what: "frees lazily unmapped addresses before their UNMAP",
    file: "domain.c",
    sound: "\tif (!domain->nr_lazy)\n\t\tmod_timer(",
    broken:
      "\tif (TWIN)\n\t\tcoiommu_iova_free(domain, iova, size);\n\tif (!domain->nr_lazy)\n\t\tmod_timer(",
    shows: async ({ qemu }) => (await readCounters(qemu.agent)).map_refused! > 0,
  },
  {
    what: "lets the device only read what it is to write",
    file: "remap_ops.c",
    sound: "return VIRTIO_IOMMU_MAP_F_WRITE;",
    broken: "return TWIN ? VIRTIO_IOMMU_MAP_F_READ : VIRTIO_IOMMU_MAP_F_WRITE;",
    shows: async ({ disk }) => disk.faults > 0,
  },
  {
    what: "never sends an UNMAP",
    file: "domain.c",
    sound: "for (i = 0; i < domain->nr_lazy; i += nr)",
    broken: "for (i = TWIN ? domain->nr_lazy : 0; i < domain->nr_lazy; i += nr)",
    shows: async ({ pins }) => pins.framesNow > 1500,
  },
];

test("what is broken is found", async (t) => {
  const guest = await ensureGuest((text) => t.diagnostic(text), writeTwins(t, TWINS));
  for (const [i, { what, shows }] of TWINS.entries())
    await t.test(`a module that ${what}`, async (t) => {
      const vm = await bootedVm(t, { guest, strategy: "viommu-lazy", load: false });
      const { agent } = vm.qemu;
      // In the background: whoever reads may wait for ever.
      const script = `(modprobe coiommu remap=all lazy=1 twin=${i + 1}; modprobe virtio_pci; modprobe virtio_blk
i=0; while [ ! -b /dev/vda ] && [ $i -lt 100 ]; do i=$((i+1)); usleep 50000; done
dd if=/dev/vda of=/dev/null bs=64k count=200) >/dev/null 2>&1 &`;
      await agent.run(script, { timeoutMs: 5000, what: "reading" });
      assert.ok(await eventually(() => shows(vm).catch(() => false), 15_000));
    });
});
