import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { demand, readCounters, unbindDisk } from "../../src/control/guest-side.ts";
import { runFio } from "../../src/machine/qemu/fio.ts";
import { parseFioWorkload } from "../../src/machine/workload-text.ts";
import { Cli } from "../support/cli.ts";
import { eventually } from "../support/eventually.ts";
import { bootedVm, pinnedPages, twoPasses } from "./support.ts";
import { blockDevice, image, userVm } from "./user-qemu.ts";

test("a fault-capable disk: only its rings are tracked, its buffers are pinned by faults, lazily unpinned, and intact", async (t) => {
  const before = pinnedPages();
  const vm = await bootedVm(t, { faultCapable: true });
  const { agent } = vm.qemu;

  const written = await runFio(agent, parseFioWorkload("fio:rw=randwrite,bs=4k,iodepth=32,seconds=3"));
  assert.deepEqual([written.verified, written.errors], [true, 0]);
  const read = await runFio(agent, parseFioWorkload("fio:rw=randread,bs=16k,iodepth=8,seconds=3"));
  assert.equal(read.errors, 0);

  const busy = await readCounters(agent);
  assert.equal(busy.map, busy.alloc, "what is mapped was allocated: rings");
  assert.ok(busy.map! > 0 && busy.frames_mapped! < 64 && busy.live_frames! > 0);
  assert.ok(vm.pins.framesFaulted > 10, "buffers are pinned when the disk touches them");
  assert.deepEqual([vm.disk.faults, vm.disk.errors, busy.map_failed], [0, 0, 0]);

  await twoPasses(vm);
  assert.equal(vm.pins.framesNow, busy.live_frames, "idle buffers are unpinned, rings stay");
  const faulted = vm.pins.framesFaulted;
  const again = await runFio(agent, parseFioWorkload("fio:rw=randwrite,bs=64k,iodepth=4,seconds=1,size=8M"));
  assert.deepEqual([again.verified, again.errors, vm.disk.faults], [true, 0, 0]);
  assert.ok(vm.pins.framesFaulted > faulted, "and the disk faults on its next ones");

  await unbindDisk(agent);
  await twoPasses(vm);
  assert.equal(vm.pins.framesNow, 0);
  assert.ok(await eventually(() => pinnedPages() === before, 5000), "the kernel counts no pin any more");
});

test("beside a fault-capable disk, one that is not is tracked as ever", async (t) => {
  const vm = await userVm(t, "pc");
  const [tracked, faulting] = [image(vm.folder, "tracked", 64), image(vm.folder, "faulting", 64)];
  const json = join(vm.folder, "result.json");
  const options = [
    "--disk",
    tracked,
    "--fault-capable-disk",
    faulting,
    "--json",
    json,
    "--interval",
    "300ms",
  ];
  const cli = new Cli(["attach", "--qmp", vm.qmp, ...options]);
  t.after(() => cli.child.kill("SIGKILL"));
  await cli.said(`is the fault-capable disk ${faulting}`);
  const [bdf] = /(\S+) is the fault-capable disk/.exec(cli.stderr)!.slice(1);
  const load = `modprobe coiommu fault_capable=${bdf}; modprobe virtio_pci; modprobe virtio_blk`;
  await demand(vm.agent, `${load}; ${blockDevice("vda")}; ${blockDevice("vdb")}`, "loading the drivers");
  const before = await readCounters(vm.agent);
  const copy = (from: string, to: string) =>
    demand(
      vm.agent,
      `dd if=${from} of=${to} bs=64k count=256 iflag=direct oflag=direct 2>/dev/null`,
      "copying",
    );
  const random = "dd if=/dev/urandom of=/dev/vda bs=64k count=256 oflag=direct 2>/dev/null";
  await demand(vm.agent, random, "writing the tracked disk");
  const { map } = await readCounters(vm.agent);
  assert.ok(map! >= before.map! + 256, "its mappings are tracked");
  await copy("/dev/vda", "/dev/vdb");
  await demand(vm.agent, "cmp -n 16777216 /dev/vda /dev/vdb", "comparing the disks");
  cli.child.kill("SIGINT");
  const ended = await cli.ended;
  assert.equal(ended.code, 0, ended.stderr);
  const { dma, pins } = JSON.parse(readFileSync(json, "utf8"));
  assert.equal(dma.faults, 0);
  assert.ok(pins.framesFaulted > 0 && pins.requests > 0 && pins.refused === 0);
});

test("the oracle: a disk that cannot fault, and whose buffers are not tracked, has its DMA refused", async (t) => {
  const vm = await bootedVm(t, { load: false });
  const script =
    "(modprobe coiommu fault_capable=0000:00:04.0; modprobe virtio_pci; modprobe virtio_blk) >/dev/null 2>&1 &";
  await vm.qemu.agent.run(script, { timeoutMs: 10_000, what: "loading the drivers" });
  assert.ok(await eventually(() => vm.disk.faults > 0, 30_000), "no DMA fault was seen");
});
