import assert from "node:assert/strict";
import { test } from "node:test";
import { EarlyUnmap } from "../../../../test/support/dma.ts";
import { type NvmeRigOptions, nvmeParts } from "../../../../test/support/nvme.ts";
import { guestOf, runWorkload } from "../../../../test/support/workload.ts";
import { MemoryStore } from "../../../device/block-store.ts";
import { type FioWorkload, parseFioWorkload } from "../../workload-text.ts";
import { type BlockOptions, BlockWorkload } from "./block.ts";
import { report } from "./workload.ts";

const MIB = 2 ** 20;

interface Options extends NvmeRigOptions {
  readonly failEvery?: number;
  readonly seed?: number;
  /** Milliseconds that pass with each look at the clock. */
  readonly step?: number;
  readonly readOnly?: boolean;
  readonly disk?: BlockOptions["disk"];
}

function run(text: string, { failEvery, seed, step, readOnly = false, disk, ...options }: Options = {}) {
  const r = nvmeParts(options);
  const doorbells: number[] = [];
  const port = {
    submit: (queue: number, tail: number) => {
      doorbells.push(tail);
      r.controller.submit(queue, tail);
    },
    complete: (queue: number, head: number) => r.controller.complete(queue, head),
  };
  const workload = new BlockWorkload({
    ...{ guest: guestOf(r, seed, step), port, queue: 3, cacheFrames: 1024 },
    workload: { size: 2 * MIB, ...parseFioWorkload(text), seconds: 1 } satisfies FioWorkload,
    region: { start: 4 * MIB, size: 8 * MIB },
    readOnly,
    disk,
  });
  r.controller.createQueue(3, workload.queue.rings);
  r.dma.failEvery = failEvery ?? r.dma.failEvery;
  runWorkload(workload, r.controller);
  workload.queue.close();
  return { ...r, ...workload.measurement, report: report([workload.measurement]), doorbells };
}

for (const text of [
  "fio:rw=randread",
  "fio:rw=randwrite",
  "fio:rw=read,bs=512",
  "fio:rw=write,bs=1536,iodepth=4",
  "fio:rw=randrw,bs=16k",
  "fio:rw=rw,bs=128k,iodepth=3",
  "fio:rw=randrw,bs=1M,iodepth=1",
])
  test(`${text}: every block that is read is what was written last, and nothing stays mapped`, () => {
    const r = run(text, { step: text.includes("bs=1M") ? 5 : 0.5 });
    assert.deepEqual([r.mismatches, r.errors, r.counters.faults, r.counters.errors], [0, 0, 0, 0]);
    assert.ok(r.ops > 20, `${r.ops} operations`);
    const blocks = Math.floor((2 * MIB) / parseFioWorkload(text).blockSize);
    assert.ok(r.compared >= blocks);
    assert.equal(r.bytes, r.ops * parseFioWorkload(text).blockSize);
    assert.deepEqual([r.dma.live, r.pages.used], [0, 0]);
    assert.equal(r.report.verified, true);
    assert.ok(r.report.latencyUs!.p50 > 0 && r.report.latencyUs!.p99 >= r.report.latencyUs!.p50);
  });

test("many requests are in flight, and frames are met again soon", () => {
  const r = run("fio:rw=randread,iodepth=32", { step: 0.1 });
  assert.equal(new Set(r.doorbells).size, 33, "all entries of the ring are used");
  assert.ok(r.dma.mapped["from-device"] / 4096 > 2 * 1024, "frames are mapped more than once");
});

test("the same seed makes the same accesses, another makes others", () => {
  const [a, b, c] = [1, 1, 2].map((seed) => run("fio:rw=randrw", { seed }));
  const image = ({ store }: { store: MemoryStore }) => {
    const bytes = new Uint8Array(2 * MIB);
    store.read(4 * MIB, bytes);
    return Buffer.from(bytes);
  };
  assert.deepEqual(a!.doorbells, b!.doorbells);
  assert.ok(image(a!).equals(image(b!)));
  assert.ok(!image(a!).equals(image(c!)));
});

for (const failEvery of [2, 5])
  test(`one mapping of ${failEvery} fails: nothing is lost`, () => {
    const r = run("fio:rw=randrw,bs=8k", { failEvery });
    assert.deepEqual([r.mismatches, r.errors, r.counters.faults, r.dma.live], [0, 0, 0, 0]);
    assert.ok(r.mapFailures > 100);
  });

test("another part of the disk is not touched", () => {
  const { store } = run("fio:rw=randwrite");
  const before = new Uint8Array(4 * MIB);
  store.read(0, before);
  assert.ok(before.every((byte) => byte === 0));
});

test("a DMA fault is an error, and the block is not compared until it is written again", () => {
  const r = run("fio:rw=randwrite", { Dma: EarlyUnmap });
  assert.ok(r.counters.faults > 0);
  assert.equal(r.errors, r.counters.faults);
  assert.deepEqual([r.ops, r.compared, r.report.verified], [0, 0, null]);
});

const BLOCK = 4 * MIB + 40 * 4096;

/** What happens to the `nth` access of BLOCK alone; the others are sound. */
class Broken extends MemoryStore {
  reads = 0;
  writes = 0;
  constructor() {
    super(2 ** 18);
  }
  override read(position: number, into: Uint8Array): void {
    if (position === BLOCK && into.length === 4096) this.readBlock(into, ++this.reads);
    else super.read(position, into);
  }
  override write(position: number, from: Uint8Array): void {
    if (position === BLOCK && from.length === 4096) this.writeBlock(from, ++this.writes);
    else super.write(position, from);
  }
  readBlock(into: Uint8Array, _nth: number): void {
    super.read(BLOCK, into);
  }
  writeBlock(from: Uint8Array, _nth: number): void {
    super.write(BLOCK, from);
  }
}

const twins: readonly [string, string, new () => Broken, number][] = [
  [
    "a bit that is written wrong",
    "fio:rw=randwrite",
    class extends Broken {
      override writeBlock(from: Uint8Array) {
        const copy = from.slice();
        copy[4095]! ^= 0x80;
        super.writeBlock(copy, 0);
      }
    },
    1,
  ],
  [
    "a write that never happens",
    "fio:rw=randwrite",
    class extends Broken {
      override writeBlock() {}
    },
    1,
  ],
  [
    "one read that never happens",
    "fio:rw=randread",
    class extends Broken {
      override readBlock(into: Uint8Array, nth: number) {
        if (nth !== 2) super.readBlock(into, nth);
      }
    },
    1,
  ],
  [
    "one read of the block beside",
    "fio:rw=randread",
    class extends Broken {
      override readBlock(into: Uint8Array, nth: number) {
        if (nth !== 2) super.readBlock(into, nth);
        else super.read(BLOCK + 4096, into);
      }
    },
    1,
  ],
];
for (const [what, text, Twin, mismatches] of twins)
  test(`broken twin: ${what} is noticed`, () => {
    const store = new Twin();
    const r = run(text, { store, step: 0.1 });
    assert.ok(store.writes + store.reads > 1, "the block was used");
    assert.deepEqual([r.mismatches, r.report.verified], [mismatches, false]);
  });

/** Blocks whose content is their own, and the disk's alone. */
class Filled extends MemoryStore {
  reads = 0;
  writes = 0;
  readonly #changes: number;
  constructor(changes = Number.POSITIVE_INFINITY) {
    super(2 ** 18);
    this.#changes = changes;
    const all = Uint8Array.from({ length: 16 * MIB }, (_, i) => (i >> 9) ^ (i >> 4));
    super.write(0, all);
  }
  override write(): void {
    this.writes++;
  }
  override read(position: number, into: Uint8Array): void {
    super.read(position, into);
    if (++this.reads === this.#changes) into[7]! ^= 1;
  }
}

for (const text of ["fio:rw=randread", "fio:rw=read,bs=512", "fio:rw=randread,bs=64k,iodepth=2"])
  test(`${text}, only read: nothing is written, and what is read is what was read first`, () => {
    const store = new Filled();
    const r = run(text, { store, step: 0.5, readOnly: true });
    assert.deepEqual([store.writes, r.mismatches, r.errors, r.report.verified], [0, 0, 0, true]);
    const blocks = (2 * MIB) / parseFioWorkload(text).blockSize;
    assert.equal(r.compared, r.ops + blocks, "all but the first reading, and the check");
    assert.deepEqual([r.dma.live, r.pages.used], [0, 0]);
  });

test("broken twin: a bit that changes on a disk that is only read is noticed, at the first reading too", () => {
  const once = run("fio:rw=randread", { store: new Filled(1000), step: 0.1, readOnly: true });
  assert.deepEqual([once.mismatches, once.report.verified], [1, false]);
  const first = run("fio:rw=randread", { store: new Filled(1), step: 0.1, readOnly: true });
  assert.ok(first.mismatches >= 1 && first.report.verified === false);
});

test("who may only read cannot be told to write", () => {
  assert.throws(() => run("fio:rw=randrw", { readOnly: true }), /does not write/);
});

test("a disk with limits: no command is longer, no queue larger, and blocks are its own", () => {
  const disk = { blockSize: 512, transferMax: 16_384, queueSizeMax: 4 };
  const store = new Filled();
  const r = run("fio:rw=randread,iodepth=32", { store, step: 0.5, readOnly: true, disk });
  assert.deepEqual([r.mismatches, r.errors], [0, 0]);
  assert.ok(new Set(r.doorbells).size <= 4, "entries of its ring");
  assert.ok(r.counters.bytes / r.counters.requests <= 16_384);
});

test("stopped early, in each phase: all is unmapped and freed", () => {
  for (const after of [1, 10, 200]) {
    const r = nvmeParts();
    const workload = new BlockWorkload({
      ...{ guest: guestOf(r), port: r.controller, queue: 1, cacheFrames: 512 },
      workload: parseFioWorkload("fio:rw=randrw,seconds=3600"),
      region: { start: 0, size: MIB },
    });
    r.controller.createQueue(1, workload.queue.rings);
    runWorkload(workload, r.controller, (n) => n === after && workload.stop());
    workload.queue.close();
    assert.deepEqual([r.dma.live, r.pages.used, workload.measurement.mismatches], [0, 0, 0]);
  }
});
