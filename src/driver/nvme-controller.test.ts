import assert from "node:assert/strict";
import { test } from "node:test";
import { type NvmeModel, nvmeModelRig } from "../../test/support/nvme-controller.ts";
import type { Gpa } from "../base/units.ts";
import { NvmeCommand } from "../wire/nvme.ts";
import { isStamped, stamp } from "../wire/stamp.ts";
import { NvmeQueue } from "./nvme.ts";
import { NvmeController, nvmePort } from "./nvme-controller.ts";

const QUEUE = 3;

/** Brought up, with one I/O queue. */
function started(change?: (model: NvmeModel) => void) {
  const rig = nvmeModelRig(change);
  const controller = new NvmeController(rig.options, 4);
  const { doorbellStride, blockSize } = controller.identity;
  const port = nvmePort(rig.model, doorbellStride);
  const queue = new NvmeQueue({ ...rig.options, port, id: QUEUE, size: 8, blockSize });
  controller.createQueue(QUEUE, queue.rings);
  const run = (kind: "read" | "write", block: number, gpa: number, length: number): number => {
    let status = -1;
    queue.submit({
      ...{ kind, block, buffers: [{ gpa: gpa as Gpa, length }] },
      done: (s) => {
        status = s;
      },
    });
    for (let turn = 0; queue.pending > 0; turn++) {
      if (turn === 100) throw new Error("the request is not answered");
      rig.model.pairs.run(1);
      queue.poll();
    }
    return status;
  };
  return { ...rig, controller, queue, run };
}

test("a controller is brought up, serves a queue, and is shut down; then nothing is mapped", () => {
  const { controller, queue, model, run, memory, dma, pages } = started();
  assert.deepEqual(controller.identity, {
    ...{ model: "a model", serial: "S1", firmware: "1.0", size: 2 ** 27, blockSize: 512 },
    ...{ transferMax: 2 ** 19, queuePairs: 4, queueSizeMax: 1024, doorbellStride: 4 },
  });
  const data = new Uint8Array(4096);
  stamp(data, 7, 1);
  memory.write(0x20_0000, data);
  assert.equal(run("write", 8, 0x20_0000, 4096), 0);
  assert.equal(run("read", 8, 0x30_0000, 4096), 0);
  memory.read(0x30_0000, data);
  assert.ok(isStamped(data, 7, 1));
  controller.deleteQueue(QUEUE);
  queue.close();
  controller.shutDown();
  // Set Features, Identify twice, Create completion queue first, Delete submission queue first.
  assert.deepEqual(model.commands, [9, 6, 6, 5, 1, 0, 4]);
  assert.deepEqual(model.complaints, []);
  assert.deepEqual([model.cc & 1, dma.live, pages.used, model.counters.faults], [0, 0, 0, 0]);
});

test("the rings of the admin queue go round", () => {
  const { controller, model } = started();
  for (let i = 0; i < 10; i++) {
    controller.deleteQueue(QUEUE);
    controller.createQueue(QUEUE, {
      submission: 0x10_0000 as never,
      completion: 0x10_1000 as never,
      size: 4,
    });
  }
  assert.deepEqual([model.commands.length, model.complaints], [45, []]);
});

for (const stride of [4, 8, 64])
  test(`doorbells are ${stride} bytes apart`, () => {
    const { model, run } = started((m) => {
      m.stride = stride;
    });
    assert.equal(run("read", 0, 0x20_0000, 512), 0);
    assert.deepEqual(model.complaints, []);
  });

test("blocks of 4 KiB: what requests count in 512 bytes, commands count in blocks", () => {
  const { controller, queue, memory } = started((m) => {
    m.blockShift = 12;
  });
  assert.deepEqual([controller.identity.blockSize, controller.identity.size], [4096, 2 ** 27]);
  queue.submit({
    kind: "read",
    block: 24,
    buffers: [{ gpa: 0x20_0000 as Gpa, length: 8192 }],
    done: () => {},
  });
  const entry = new Uint8Array(NvmeCommand.size);
  memory.read(queue.rings.submission, entry);
  const { slba, nlb } = NvmeCommand.read(entry);
  assert.deepEqual([slba, nlb], [3, 1]);
});

test("a format behind the sixteenth is found", () => {
  const { controller } = started((m) => {
    Object.assign(m, { formats: 20, flbas: 0x22, blockShift: 10 });
  });
  assert.equal(controller.identity.blockSize, 1024);
});

test("a controller without a limit of its transfers, and one that gives fewer queues", () => {
  const { controller } = started((m) => Object.assign(m, { mdts: 0, queuePairs: 3, queueSizeMax: 16 }));
  const { transferMax, queuePairs, queueSizeMax } = controller.identity;
  assert.deepEqual([transferMax, queuePairs, queueSizeMax], [Number.POSITIVE_INFINITY, 3, 16]);
});

test("one that firmware left enabled is stopped first", () => {
  const { model } = started((m) => Object.assign(m, { cc: 1, csts: 1 }));
  assert.deepEqual(model.complaints, []);
});

const failures: readonly [string, (model: NvmeModel) => void, RegExp][] = [
  [
    "never ready",
    (m) => Object.assign(m, { broken: "never ready" }),
    /does not become ready: not in 2000 ms/,
  ],
  ["a fatal error", (m) => Object.assign(m, { broken: "fatal" }), /does not become ready: .*CSTS\.CFS/],
  ["never stops", (m) => Object.assign(m, { broken: "never ready", csts: 1 }), /does not stop: not in/],
  ["left the bus", (m) => Object.assign(m, { broken: "gone" }), /has left the bus/],
  ["no answer", (m) => Object.assign(m, { broken: "silent" }), /does not answer Set Features: not in 60000/],
  ["no NVM commands", (m) => Object.assign(m, { capHigh: 0 }), /no NVM command set/],
  ["pages of 8 KiB", (m) => Object.assign(m, { capHigh: 0x1_0020 }), /no pages of 4 KiB/],
  ["no namespace", (m) => Object.assign(m, { blocks: 0 }), /no namespace 1/],
  ["metadata", (m) => Object.assign(m, { metadata: 8 }), /2\^9 bytes with 8 bytes of metadata/],
  ["large blocks", (m) => Object.assign(m, { blockShift: 13 }), /2\^13 bytes/],
  ["Identify is refused", (m) => Object.assign(m.refuses, { 6: 0x0b }), /refuses Identify: status bh/],
  [
    "a queue is refused",
    (m) => Object.assign(m.refuses, { 1: 0x102 }),
    /refuses Create I\/O Sub.*: status 102h/,
  ],
];
for (const [what, change, sentence] of failures)
  test(`${what}: one sentence`, () => {
    assert.throws(() => started(change), { code: "ERR_COIOMMU_NVME", message: sentence });
  });

test("a controller that does not shut down is told of", () => {
  const { controller, queue } = started((m) => Object.assign(m, { broken: "never shut down" }));
  controller.deleteQueue(QUEUE);
  queue.close();
  assert.throws(() => controller.shutDown(), { message: /does not shut down: not in 5000 ms/ });
});

test("the model complains of a driver that shuts down with I/O queues, or rings before it is ready", () => {
  const { controller, model } = started();
  controller.shutDown();
  model.store32(0x1000, 1);
  assert.deepEqual(model.complaints, ["shut down with I/O queues", "a doorbell before it is ready"]);
});
