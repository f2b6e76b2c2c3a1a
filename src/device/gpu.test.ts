import assert from "node:assert/strict";
import test from "node:test";
import { ram } from "../../test/support/guest.ts";
import { zeroCounters } from "../../test/support/nvme.ts";
import { random } from "../../test/support/random.ts";
import type { Gfn, Iova } from "../base/units.ts";
import { GatedMemory, NO_FRAME } from "../memory/gated-memory.ts";
import {
  GPU_BUS_ERROR,
  GPU_COPY,
  GPU_DONE,
  GPU_INVALID,
  GPU_LENGTH_MAX,
  GPU_NO_PAGE,
  GPU_OK,
  GpuCommand,
  GpuPage,
  gpuError,
} from "../wire/gpu.ts";
import { isStamped, stamp } from "../wire/stamp.ts";
import { Gpu } from "./gpu.ts";

const RING = 0x1000;
const TABLE = 0x2000;
const SIZE = 4;
const PAGES = 64;
const FRAME = 0x10_0000;

/** A device behind an IOMMU that maps all but `forbidden`; page `i` of its table is the frame at FRAME + 8192 * i. */
function setUp() {
  const memory = ram(1024);
  const forbidden = new Set<number>();
  const translate = (page: number) => (forbidden.has(page * 4096) ? NO_FRAME : (page as Gfn));
  const gate = { enter() {}, leave() {}, translate, request: () => false, fault() {} };
  const counters = zeroCounters();
  const gpu = new Gpu(new GatedMemory(memory, gate), counters);
  gpu.start({ ring: { iova: RING as Iova, size: SIZE }, table: TABLE as Iova, pages: PAGES });
  const page = (i: number, entry: number) => memory.write(TABLE + 8 * i, GpuPage.encode({ entry }));
  for (let i = 0; i < PAGES; i++) page(i, FRAME + 8192 * i + 1);
  let tail = 0;
  const add = (fields: Parameters<typeof GpuCommand.encode>[0]) => {
    const at = RING + tail * GpuCommand.size;
    memory.write(at, GpuCommand.encode({ opcode: GPU_COPY, length: 512, ...fields }));
    tail = (tail + 1) % SIZE;
    gpu.submit(tail);
    return () => memory.load16(at + GpuCommand.fields.status.at);
  };
  const execute = (fields: Parameters<typeof GpuCommand.encode>[0]): number => {
    const status = add(fields);
    assert.deepEqual(gpu.run(8), { completed: 1, more: false });
    assert.ok(status() & GPU_DONE);
    return gpuError(status());
  };
  return { memory, forbidden, counters, gpu, page, add, execute };
}

test("a copy goes through the table, from offset to offset", () => {
  const { memory, execute, counters } = setUp();
  const data = new Uint8Array(8192);
  stamp(data, 3, 4);
  const piece = (page: number, from: number, to: number, done: number) =>
    memory.write(FRAME + 8192 * page + from, data.subarray(done, done + to - from));
  piece(1, 100, 4096, 0);
  piece(2, 0, 4096, 3996);
  piece(3, 0, 100, 8092);
  assert.equal(execute({ source: 4096 + 100, target: 4096 * 10 + 4000, length: 8192 }), GPU_OK);
  const back = new Uint8Array(8192);
  for (const [page, from, to, done] of [
    [10, 4000, 4096, 0],
    [11, 0, 4096, 96],
    [12, 0, 4000, 4192],
  ] as const)
    memory.read(FRAME + 8192 * page + from, back.subarray(done, done + to - from));
  assert.ok(isStamped(back, 3, 4));
  assert.deepEqual([counters.transfers, counters.bytes], [6, 16384]);
});

const END = PAGES * 4096;
for (const [what, fields, error] of [
  ["another opcode", { opcode: 2 }, GPU_INVALID],
  ["nothing", { length: 0 }, GPU_INVALID],
  ["more than a command may", { length: GPU_LENGTH_MAX + 1 }, GPU_INVALID],
  ["from behind the table", { source: END - 511 }, GPU_INVALID],
  ["to behind the table", { target: END }, GPU_INVALID],
  ["to beyond all numbers", { target: 2 ** 64 - 2048 }, GPU_INVALID],
  ["an entry that is not valid", { source: 4096 * 20 }, GPU_NO_PAGE],
  ["an entry with other bits", { source: 4096 * 19 + 4000 }, GPU_NO_PAGE],
  ["an entry that is not RAM", { target: 4096 * 21 }, GPU_BUS_ERROR],
] as const)
  test(`refused: ${what}`, () => {
    const { execute, page, counters } = setUp();
    page(20, FRAME);
    page(19, FRAME + 3);
    page(21, 2 ** 45 + 1);
    assert.deepEqual([execute(fields), counters.errors, counters.faults], [error, 1, 0]);
    assert.equal(execute({}), GPU_OK);
  });

for (const [what, frame] of [
  ["source", FRAME],
  ["target", FRAME + 8192],
  ["table", TABLE],
] as const)
  test(`DMA fault at the ${what}: an error of the command, counted, and the ring goes on`, () => {
    const { execute, forbidden, counters } = setUp();
    forbidden.add(frame);
    assert.equal(execute({ target: 4096 }), GPU_BUS_ERROR);
    assert.deepEqual([counters.faults, counters.errors, counters.requests], [1, 0, 1]);
    forbidden.clear();
    assert.equal(execute({ target: 4096 }), GPU_OK);
  });

test("DMA fault at the ring: counted, and the command is executed once in the end", () => {
  const { add, gpu, forbidden, counters, memory } = setUp();
  const status = add({ target: 4096 });
  // It goes away while the command is executed.
  const write = memory.write.bind(memory);
  memory.write = (gpa, from) => {
    forbidden.add(RING);
    write(gpa, from);
  };
  for (let i = 1; i <= 3; i++) {
    assert.deepEqual(gpu.run(8), { completed: 0, more: false });
    assert.deepEqual([counters.faults, counters.transfers, status()], [i, 2, 0]);
  }
  forbidden.clear();
  assert.equal(gpu.run(8).completed, 1);
  assert.deepEqual([counters.transfers, status()], [2, GPU_DONE]);
});

test("no more than the limit in one run; an invalid tail is counted and ignored", () => {
  const { add, gpu, counters } = setUp();
  for (let i = 0; i < 3; i++) add({});
  for (const tail of [-1, SIZE, 2 ** 31]) gpu.submit(tail);
  assert.equal(counters.errors, 3);
  assert.deepEqual(gpu.run(2), { completed: 2, more: true });
  assert.deepEqual(gpu.run(2), { completed: 1, more: false });
});

for (let seed = 1; seed <= 8; seed++)
  test(`hostile commands and tables: each gets an answer (seed ${seed})`, () => {
    const next = random(seed);
    const { execute, page, forbidden } = setUp();
    const number = () => [next(END), next(2 ** 32), next(2 ** 31) * 2 ** 33][next(3)]!;
    for (let i = 0; i < 300; i++) {
      // Pages of the table itself, and of nothing; never the ring, which holds the answer.
      page(next(PAGES), [TABLE + 1, number(), FRAME + 4096 * next(256) + 1][next(3)]!);
      forbidden.clear();
      if (next(2)) forbidden.add(FRAME + 4096 * next(256));
      execute({ opcode: next(4), length: next(2 ** next(20)), source: number(), target: number() });
    }
  });
