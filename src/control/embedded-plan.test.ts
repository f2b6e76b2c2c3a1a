import assert from "node:assert/strict";
import test from "node:test";
import { type Bdf, milliseconds } from "../base/units.ts";
import type { NvmeIdentity } from "../driver/nvme-controller.ts";
import { type EmbeddedOptions, planDevices, planLoads } from "./embedded-plan.ts";
import { parseWorkload } from "./workload.ts";

const options = (workload: string, cpus: number, memoryMiB = 1024): EmbeddedOptions => ({
  ...{ memoryMiB, cpus, strategy: "coiommu", policy: "lru", pinner: "software" },
  ...{ interval: milliseconds(1000), quota: Number.POSITIVE_INFINITY, disk: { sizeMiB: 256 } },
  ...{ beforeActivation: "none" as const, activationTimeout: Number.POSITIVE_INFINITY },
  workload: parseWorkload(workload),
});
const DISK = 256 * 2 ** 20;

/** Of each CPU that does something: its queue depth, and its part of the disk. */
const parts = (workload: string, cpus: number, diskBytes = DISK) =>
  planLoads(options(workload, cpus), diskBytes).flatMap((load) =>
    load?.name === "fio" ? [{ depth: load.fio.ioDepth, ...load.region }] : [],
  );

test("a fio job on several CPUs has the depth and the size of one", () => {
  for (const cpus of [1, 2, 3, 7, 64])
    for (const [workload, depth, bytes] of [
      ["fio:iodepth=32,bs=4k", 32, 2 ** 26],
      ["fio:iodepth=5,bs=64k,size=10M", 5, 10 * 2 ** 20],
      ["fio:iodepth=256,bs=1M,size=3M", 256, 3 * 2 ** 20],
    ] as const) {
      const all = parts(workload, cpus);
      assert.equal(
        all.reduce((sum, part) => sum + part.depth, 0),
        depth,
        `${workload} on ${cpus}`,
      );
      assert.ok(all.every((part) => part.depth > 0 && part.size > 0));
      let end = 0;
      for (const { start, size } of all) {
        assert.equal(start, end);
        end += size;
      }
      assert.equal(end, bytes);
    }
});

test("a small disk is used as far as it goes; one smaller than a block is refused", () => {
  assert.deepEqual(parts("fio:bs=4k", 2, 3 * 4096 + 512), [
    { depth: 16, start: 0, size: 4096 },
    { depth: 16, start: 4096, size: 8192 },
  ]);
  assert.throws(() => parts("fio:bs=4k", 1, 2048), { code: "ERR_COIOMMU_USER" });
});

test("all CPUs share the disk; of other devices each has its own, as far as there are any", () => {
  assert.deepEqual(planDevices(options("fio", 3)), [{ kind: "disk", endpoint: 0x20, cpus: [0, 1, 2] }]);
  assert.deepEqual(planDevices(options("nic", 2)), [
    { kind: "nic", endpoint: 0x20, cpus: [0] },
    { kind: "nic", endpoint: 0x28, cpus: [1] },
  ]);
  assert.equal(planDevices(options("gpu:size=64k", 20)).length, 8);
  assert.deepEqual(
    planLoads(options("nic", 10), 0).map((load) => load?.name),
    [...Array.from({ length: 8 }, () => "nic"), undefined, undefined],
  );
});

test("buffers of a graphics device must fit into a CPU's part of memory", () => {
  const planned = (cpus: number) => planLoads(options("gpu:buffers=4,size=16M", cpus, 256), 0);
  assert.equal(planned(3).length, 3);
  assert.throws(() => planned(4), { code: "ERR_COIOMMU_USER" });
});

const REAL: NvmeIdentity = {
  ...{ model: "m", serial: "s", firmware: "f", size: DISK, blockSize: 4096, transferMax: 2 ** 17 },
  ...{ queuePairs: 2, queueSizeMax: 1024, doorbellStride: 4 },
};
const real = (workload: string, cpus = 1, overwrite = false) =>
  planLoads({ ...options(workload, cpus), device: { bdf: 0x30 as Bdf, overwrite } }, DISK, REAL);

test("a real disk is the only device, at its own place, and is only read unless the user says otherwise", () => {
  const settings = { ...options("fio:", 2), device: { bdf: 0x30 as Bdf, overwrite: false } };
  assert.deepEqual(planDevices(settings), [{ kind: "disk", endpoint: 0x30, cpus: [0, 1] }]);
  const readOnly = (loads: ReturnType<typeof real>) =>
    loads.map((load) => load?.name === "fio" && [load.readOnly, load.disk]);
  assert.deepEqual(readOnly(real("fio:rw=randread", 2)), [
    [true, REAL],
    [true, REAL],
  ]);
  assert.deepEqual(readOnly(real("fio:rw=randread", 1, true)), [[false, REAL]]);
});

for (const [workload, cpus, sentence] of [
  ["fio:bs=6k", 1, /bs must be a multiple of the disk's blocks, of 4096 bytes/],
  ["fio:bs=512", 1, /bs must be a multiple/],
  ["fio:bs=256k", 1, /bs must be at most 131072/],
  ["idle:seconds=1", 3, /--cpus 3: the disk has a queue for 2 of them only/],
] as const)
  test(`${workload} on ${cpus} CPUs: what a real disk cannot do is one sentence`, () => {
    assert.throws(() => real(workload, cpus), { code: "ERR_COIOMMU_USER", message: sentence });
  });
