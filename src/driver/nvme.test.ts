import assert from "node:assert/strict";
import test from "node:test";
import { EarlyUnmap, JoiningDma } from "../../test/support/dma.ts";
import { nvmeRig } from "../../test/support/nvme.ts";
import { random } from "../../test/support/random.ts";
import type { Gpa } from "../base/units.ts";
import { MemoryStore } from "../device/block-store.ts";
import { NVME_DATA_TRANSFER_ERROR, NVME_LBA_OUT_OF_RANGE } from "../wire/nvme.ts";
import { isStamped, stamp } from "../wire/stamp.ts";
import type { DmaBuffer } from "./dma-api.ts";
import type { NvmeRequest } from "./nvme.ts";

type Rig = ReturnType<typeof nvmeRig>;
const at = (gpa: number, length: number): DmaBuffer => ({ gpa: gpa as Gpa, length });

/** Run one request to its end; returns its status. */
function run({ queue, settle }: Rig, request: Omit<NvmeRequest, "done">): number {
  let status = -1;
  queue.submit({
    ...request,
    done: (s) => {
      status = s;
    },
  });
  settle();
  return status;
}

const poke = (r: Rig, buffers: readonly DmaBuffer[], data: Uint8Array) => {
  let done = 0;
  for (const { gpa, length } of buffers) {
    r.memory.write(gpa, data.subarray(done, done + length));
    done += length;
  }
};
const peek = (r: Rig, buffers: readonly DmaBuffer[]): Uint8Array =>
  Buffer.concat(
    buffers.map(({ gpa, length }) => {
      const part = new Uint8Array(length);
      r.memory.read(gpa, part);
      return part;
    }),
  );

/** Every second frame from the top down, so that nothing is contiguous; the first begins at `offset`. */
function scattered(length: number, offset = 0): DmaBuffer[] {
  const buffers: DmaBuffer[] = [];
  for (let done = 0, frame = 8000; done < length; frame -= 2) {
    const start = done === 0 ? offset : 0;
    const size = Math.min(4096 - start, length - done);
    buffers.push(at(frame * 4096 + start, size));
    done += size;
  }
  return buffers;
}

const layouts: readonly [string, readonly DmaBuffer[]][] = [
  ["one block", [at(0x10_0000, 512)]],
  ["a block within a frame", [at(0x10_0404, 512)]],
  ["exactly one frame", [at(0x10_0000, 4096)]],
  ["one frame over two", [at(0x10_0200, 4096)]],
  ["exactly two frames", scattered(8192)],
  ["two frames at an offset: the shortest list", scattered(8192, 512)],
  ["33 frames: the longest small list", scattered(33 * 4096)],
  ["34 frames: the shortest page of a list", scattered(34 * 4096)],
  ["513 frames: a full page of a list", scattered(513 * 4096)],
  ["514 frames: the shortest chain", scattered(514 * 4096)],
  ["4 MiB at an offset: a chain of three", scattered(2 ** 22, 2048)],
  ["one contiguous buffer of 40 frames at an offset", [at(0x10_0e00, 40 * 4096)]],
];
for (const [what, buffers] of layouts)
  test(`written and read back: ${what}`, () => {
    const r = nvmeRig({ frames: 8192 });
    const length = buffers.reduce((sum, b) => sum + b.length, 0);
    const data = new Uint8Array(length);
    stamp(data, length, 1);
    poke(r, buffers, data);
    assert.equal(run(r, { kind: "write", block: 3, buffers }), 0);
    poke(r, buffers, new Uint8Array(length));
    assert.equal(run(r, { kind: "read", block: 3, buffers }), 0);
    assert.ok(isStamped(peek(r, buffers), length, 1));
    assert.deepEqual([r.dma.mapped["to-device"], r.dma.mapped["from-device"]], [length, length]);
    assert.deepEqual([r.counters.bytes, r.counters.faults, r.counters.errors], [2 * length, 0, 0]);
    r.queue.close();
    assert.deepEqual([r.dma.live, r.pages.used], [0, 0]);
  });

test("a mapping with fewer segments than buffers", () => {
  const r = nvmeRig({ frames: 8192, Dma: JoiningDma });
  const buffers = [at(0x10_0400, 3072), at(0x10_1000, 4096), at(0x10_2000, 4096), at(0x20_0000, 1024)];
  const data = new Uint8Array(3 * 4096);
  stamp(data, 1, 2);
  poke(r, buffers, data);
  assert.equal(run(r, { kind: "write", block: 0, buffers }), 0);
  poke(r, buffers, new Uint8Array(data.length));
  assert.equal(run(r, { kind: "read", block: 0, buffers }), 0);
  assert.ok(isStamped(peek(r, buffers), 1, 2));
  r.queue.close();
  assert.equal(r.dma.live, 0);
});

/** `count` writes of one block each, all submitted at once, then read back. Returns the numbers of wrong blocks. */
function wrongBlocks(r: Rig, count: number): number[] {
  const frame = (i: number) => 0x10_0000 + 4096 * i;
  const statuses: number[] = [];
  const all = (kind: "read" | "write") => {
    for (let i = 0; i < count; i++)
      r.queue.submit({ kind, block: i, buffers: [at(frame(i), 512)], done: (s) => statuses.push(s) });
    r.settle();
  };
  const block = new Uint8Array(512);
  for (let i = 0; i < count; i++) {
    stamp(block, i, 1);
    r.memory.write(frame(i), block);
  }
  all("write");
  for (let i = 0; i < count; i++) r.memory.write(frame(i), new Uint8Array(512));
  all("read");
  assert.equal(statuses.length, 2 * count);
  return Array.from({ length: count }, (_, i) => i).filter((i) => {
    r.memory.read(frame(i), block);
    return !isStamped(block, i, 1);
  });
}

for (const size of [2, 3, 8])
  test(`more requests than a queue of ${size} holds, over many rounds of its rings`, () => {
    const r = nvmeRig({ size });
    assert.deepEqual(wrongBlocks(r, 100), []);
    assert.deepEqual([r.counters.requests, r.counters.errors, r.queue.strays], [200, 0, 0]);
    r.queue.close();
    assert.equal(r.dma.live, 0);
  });

for (const n of [2, 3, 7])
  test(`one mapping of ${n} fails: every request is done in the end, once`, () => {
    const r = nvmeRig();
    r.dma.failEvery = n;
    assert.deepEqual(wrongBlocks(r, 50), []);
    assert.ok(r.dma.failures > 10);
    assert.deepEqual([r.queue.mapFailures, r.counters.requests, r.counters.faults], [r.dma.failures, 100, 0]);
    r.queue.close();
    assert.equal(r.dma.live, 0);
  });

test("a list that cannot be had leaves nothing behind, and the request is done later", () => {
  const r = nvmeRig({ frames: 8192 });
  const buffers = scattered(2 ** 22, 2048); // needs three pages of lists
  r.dma.failEvery = 2; // after the rings: page, failure; page, failure; ...
  assert.equal(run(r, { kind: "read", block: 0, buffers }), 0);
  assert.ok(r.queue.mapFailures >= 2);
  r.queue.close();
  assert.deepEqual([r.dma.live, r.pages.used], [0, 0]);
});

test("rings that cannot be had: the constructor throws and frees", () => {
  const rig = nvmeRig();
  rig.queue.close();
  class Second extends EarlyUnmap {
    override failEvery = 2;
  }
  assert.throws(() => nvmeRig({ Dma: Second }), { code: "ERR_COIOMMU_DMA_MAP" });
  assert.equal(rig.dma.live, 0);
});

test("a flush maps nothing; an error of the controller is the request's status", () => {
  const r = nvmeRig();
  const attempts = r.dma.attempts;
  assert.equal(run(r, { kind: "flush", block: 0, buffers: [] }), 0);
  assert.equal(r.dma.attempts, attempts);
  assert.equal(
    run(r, { kind: "read", block: r.store.sectors, buffers: [at(0x10_0000, 512)] }),
    NVME_LBA_OUT_OF_RANGE,
  );
});

test("broken twin: a driver that unmaps too early gets DMA faults", () => {
  const r = nvmeRig({ Dma: EarlyUnmap });
  assert.equal(run(r, { kind: "read", block: 0, buffers: [at(0x10_0000, 4096)] }), NVME_DATA_TRANSFER_ERROR);
  assert.equal(run(r, { kind: "write", block: 0, buffers: scattered(8192) }), NVME_DATA_TRANSFER_ERROR);
  assert.equal(r.counters.faults, 2);
});

test("broken twin: a disk with one wrong byte is noticed", () => {
  class Flips extends MemoryStore {
    override read(position: number, into: Uint8Array): void {
      super.read(position, into);
      if (position === 17 * 512) into[300]! ^= 1;
    }
  }
  assert.deepEqual(wrongBlocks(nvmeRig({ store: new Flips(2 ** 18) }), 50), [17]);
});

test("a completion of a command that is not in flight is counted and harms nobody", () => {
  const r = nvmeRig();
  r.memory.write(r.queue.rings.completion + 12, Uint8Array.of(0xff, 0xff, 1, 0));
  assert.equal(r.queue.poll(), 1);
  assert.equal(r.queue.strays, 1);
});

test("requests submitted from within done(), at every depth", () => {
  const r = nvmeRig({ size: 4 });
  const next = random(1);
  let left = 200;
  const more = () => {
    if (left-- <= 0) return;
    const buffers = scattered(4096 * (1 + next(4)));
    r.queue.submit({ kind: "read", block: next(1000), buffers, done: more });
    if (next(3) === 0) more();
  };
  more();
  r.settle();
  assert.ok(left < 0);
  r.queue.close();
  assert.equal(r.dma.live, 0);
});
