/**
 * The embedded machine with an NVMe function of "this machine": a model behind the kernel's interface. What a real IOMMU
 * and a real kernel do is not covered here: test/vfio has them.
 */
import assert from "node:assert/strict";
import { once } from "node:events";
import { type TestContext, test } from "node:test";
import { Worker } from "node:worker_threads";
import { type Bdf, milliseconds } from "../../src/base/units.ts";
import { EmbeddedMachine } from "../../src/control/embedded.ts";
import type { EmbeddedOptions } from "../../src/control/embedded-plan.ts";
import { RealDisk } from "../../src/control/real-disk.ts";
import type { RunResult } from "../../src/control/result.ts";
import { run } from "../../src/control/run.ts";
import { parseWorkload } from "../../src/control/workload.ts";
import { SharedMapping } from "../../src/host/mapping.ts";
import { Bell } from "../../src/memory/bell.ts";
import { fieldDifferences } from "../support/result-fields.ts";
import { FakeVfioKernel } from "../support/vfio-kernel.ts";
import type { NvmeFunctionData, NvmeFunctionEnd } from "./nvme-function.ts";

const BAR_SIZE = 16_384;
const entry = (name: string) => new URL(`./${name}.ts`, import.meta.url);

/** Its BAR is memory; it notes how much was pinned when the function was made to stop. */
class KernelWithMemory extends FakeVfioKernel {
  readonly bar = new SharedMapping(BAR_SIZE);
  machine: EmbeddedMachine | undefined;
  pinnedAtStop = -1;

  override map(): number {
    return this.bar.address;
  }
  override unmap(): void {
    this.log.push("unmap");
  }
  override write(fd: number, from: Uint8Array, offset: number): void {
    super.write(fd, from, offset);
    if (this.log.at(-1) === "master off") this.pinnedAtStop = this.machine?.pins.framesNow ?? -1;
  }
}

interface Setup {
  readonly options?: Partial<EmbeddedOptions>;
  readonly workload?: string;
  readonly overwrite?: boolean;
  readonly blindAfter?: number;
}

function setup({
  options,
  workload = "fio:rw=randread,iodepth=8,seconds=1,size=4M",
  overwrite = false,
}: Setup) {
  const kernel = new KernelWithMemory();
  const all = {
    ...{ memoryMiB: 128, cpus: 2, strategy: "coiommu", policy: "lru", pinner: "vfio" },
    ...{ interval: milliseconds(50), quota: Number.POSITIVE_INFINITY, disk: { sizeMiB: 64 } },
    ...{ beforeActivation: "none", activationTimeout: Number.POSITIVE_INFINITY },
    ...{ device: { bdf: 0x30 as Bdf, overwrite, kernel }, backendEntry: entry("real-disk-backend") },
    workload: parseWorkload(workload),
    ...options,
  } satisfies EmbeddedOptions;
  return { kernel, options: all };
}

/** A machine, and the function behind its registers. */
async function started(t: TestContext, what: Setup) {
  const { kernel, options } = setup(what);
  const machine = await EmbeddedMachine.start(options);
  kernel.machine = machine;
  const bell = Bell.buffer();
  const { address, size } = kernel.bar;
  const data: NvmeFunctionData = {
    ...{ bar: { address, size }, ram: machine.ram, iommu: machine.iommuTable, bell },
    blindAfter: what.blindAfter ?? Number.POSITIVE_INFINITY,
  };
  const worker = new Worker(entry("nvme-function"), { workerData: data });
  await once(worker, "message");
  const ended = once(worker, "message") as Promise<[NvmeFunctionEnd]>;
  const stop = async () => {
    new Bell(bell).ring();
    return (await ended)[0];
  };
  // The function first: its memory goes with the machine.
  t.after(async () => {
    await stop();
    await machine.close().catch(() => {});
  });
  return { kernel, options, machine, stop };
}

/** The function must have ended before RAM goes, which machine.close() unmaps. */
async function result(t: TestContext, what: Setup) {
  const { kernel, options, machine, stop } = await started(t, what);
  let end: NvmeFunctionEnd | undefined;
  const { close } = machine;
  machine.close = async () => {
    end ??= await stop();
    return await close.call(machine);
  };
  const outcome = await run(
    options,
    async () => machine,
    () => {},
  );
  return { ...outcome, kernel, end: end! };
}

function checkSound({ workload, dma, device, pinner, maps }: RunResult): void {
  assert.deepEqual([workload.errors, workload.verified, device, pinner], [0, true, "0000:00:06.0", "vfio"]);
  assert.deepEqual(dma, { transfers: null, bytes: null, faults: null });
  assert.equal(maps.map, maps.unmap);
}

for (const [strategy, workload, overwrite] of [
  ["coiommu", "fio:rw=randread,iodepth=8,seconds=1,size=4M", false],
  ["coiommu", "fio:rw=randrw,bs=16k,iodepth=8,seconds=1,size=4M", true],
  ["coiommu", "fio:rw=randread,seconds=1,size=4M", true],
  ["static", "fio:rw=randread,iodepth=8,seconds=1,size=4M", false],
  ["static", "fio:rw=randwrite,iodepth=8,seconds=1,size=4M", true],
] as const)
  test(`${strategy}, ${workload}, ${overwrite ? "which may write" : "only read"}: nothing is lost, no DMA fault`, async (t) => {
    const {
      result: found,
      complaints,
      kernel,
      end,
    } = await result(t, {
      ...{ options: { strategy }, workload, overwrite },
    });
    checkSound(found);
    assert.deepEqual([fieldDifferences(found), complaints], [[], []]);
    assert.deepEqual([end.complaints, end.faults], [[], 0]);
    assert.ok(end.bytes > 4 * 2 ** 20 && kernel.pinnedAtStop > 0, `${kernel.pinnedAtStop} frames`);
    if (strategy === "coiommu") assert.deepEqual([found.maps.liveAtEnd, found.pins.refused], [0, 0]);
    assert.deepEqual([kernel.files.size, kernel.mastering], [0, false]);
    assert.deepEqual(
      kernel.log.filter((line) => line.startsWith("master") || line === "reset"),
      [...["master on", "master off", "reset"]],
    );
  });

test("broken twin: reads that move nothing, as those that an IOMMU blocks, are noticed on a disk that is only read", async (t) => {
  const { result: found } = await result(t, { blindAfter: 3000 });
  assert.equal(found.workload.verified, false);
});

test("a disk that nobody uses", async (t) => {
  const { result: found, end } = await result(t, { workload: "idle:seconds=1" });
  assert.deepEqual([found.workload.errors, end.complaints, found.maps.liveAtEnd], [0, [], 0]);
});

test("a guest that is ended in the middle of its work: the function is stopped before any pin goes", async (t) => {
  const { kernel, machine, stop } = await started(t, { workload: "fio:rw=randread,seconds=60" });
  await machine.resume();
  await machine.boot();
  const working = machine.work(parseWorkload("fio:seconds=60"));
  working.catch(() => {});
  await new Promise((resolve) => setTimeout(resolve, 500));
  kernel.log.length = 0;
  await stop();
  await machine.close();
  assert.deepEqual(kernel.log.slice(0, 2), ["master off", "reset"]);
  assert.ok(kernel.pinnedAtStop > 0);
  assert.deepEqual([machine.pins.framesNow, kernel.files.size], [0, 0]);
});

test("a function that does not answer: one sentence, and all is closed", async () => {
  const { kernel, options } = setup({});
  await assert.rejects(
    run(
      options,
      () => EmbeddedMachine.start(options),
      () => {},
    ),
    { message: "the NVMe controller has no NVM command set, or no pages of 4 KiB" },
  );
  assert.deepEqual([kernel.files.size, kernel.mastering], [0, false]);
});

test("more CPUs than it has queues: one sentence", async (t) => {
  const { machine } = await started(t, { options: { cpus: 5 } });
  await machine.resume();
  await assert.rejects(machine.boot(), { message: /^--cpus 5: the disk has a queue for 4 of them only$/ });
});

test("what is no NVMe controller is refused, and left as it was", async () => {
  const { kernel, options } = setup({});
  kernel.config[9] = 1;
  await assert.rejects(EmbeddedMachine.start(options), {
    message: /^0000:00:06\.0: this is no NVMe controller: its class is 010801h$/,
  });
  assert.deepEqual([kernel.files.size, kernel.log.includes("reset")], [0, false]);
});

test("a guest of 4 GiB and more has its RAM around what the IOMMU reserves", async (t) => {
  const { kernel, machine } = await started(t, { options: { memoryMiB: 4096 } });
  await machine.resume();
  await machine.boot();
  assert.ok(!(machine.ram instanceof SharedArrayBuffer));
  assert.deepEqual(machine.ram.hole, { start: 0xfee0_0000, size: 0x10_0000 });
  assert.ok(kernel.mastering);
});

const RESERVED = "/sys/bus/pci/devices/0000:00:06.0/iommu_group/reserved_regions";
const MSI = "0x00000000fee00000 0x00000000feefffff msi\n";
for (const [memoryMiB, text, hole] of [
  [4077, MSI, undefined],
  [4079, MSI, { start: 0xfee0_0000, size: 0x10_0000 }],
  // As an AMD's, which has one below 1 TiB too; and two of which RAM behind the first would meet the second.
  [8192, `0x000000fd00000000 0x000000ffffffffff reserved\n${MSI}`, { start: 0xfee0_0000, size: 0x10_0000 }],
  [4079, `${MSI}0x00000000fef00000 0x0000000100000123 reserved\n`, { start: 0xfee0_0000, size: 0x120_1000 }],
  [4079, "", undefined],
] as const)
  test(`${memoryMiB} MiB of RAM where the IOMMU reserves "${text.trim().replace("\n", ", ")}"`, () => {
    const kernel = new KernelWithMemory();
    kernel.texts = { [RESERVED]: text };
    const disk = new RealDisk({ bdf: 0x30 as Bdf, overwrite: false, kernel }, "vfio", memoryMiB);
    assert.deepEqual(disk.hole, hole);
    disk.close();
  });

test("an IOMMU that reserves low addresses is refused in one sentence", async () => {
  const { kernel, options } = setup({});
  kernel.texts = { [RESERVED]: "0x0000000000000000 0x0000000000ffffff direct\n" };
  await assert.rejects(EmbeddedMachine.start(options), { message: /reserves low addresses/ });
  assert.equal(kernel.files.size, 0);
});
