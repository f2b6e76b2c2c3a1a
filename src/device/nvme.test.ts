import assert from "node:assert/strict";
import test from "node:test";
import { ram } from "../../test/support/guest.ts";
import { zeroCounters } from "../../test/support/nvme.ts";
import { random } from "../../test/support/random.ts";
import { HostError } from "../base/errors.ts";
import type { Gfn, Iova } from "../base/units.ts";
import { GatedMemory, NO_FRAME } from "../memory/gated-memory.ts";
import * as wire from "../wire/nvme.ts";
import { isStamped, stamp } from "../wire/stamp.ts";
import { MemoryStore } from "./block-store.ts";
import { NVME_TRANSFER_MAX, NvmeController } from "./nvme.ts";

const SQ = 0x1000;
const CQ = 0x2000;
const LIST = 0x4000;
const DATA = 0x10_0000;
const FRAMES = 4096;
const BLOCKS = 2 ** 14;
const READ = wire.NVME_CMD_READ;
const WRITE = wire.NVME_CMD_WRITE;
const FLUSH = wire.NVME_CMD_FLUSH;

type Fields = Parameters<typeof wire.NvmeCommand.encode>[0];

/** A controller behind an IOMMU that maps all but `forbidden`, and a guest that writes what it likes. */
function setUp({ size = 4, store = new MemoryStore(BLOCKS) } = {}) {
  const memory = ram(FRAMES);
  const forbidden = new Set<number>();
  const gate = {
    enter() {},
    leave() {},
    translate: (page: number) => (forbidden.has(page * 4096) ? NO_FRAME : (page as Gfn)),
    request: () => false,
    fault() {},
  };
  const counters = zeroCounters();
  const controller = new NvmeController(new GatedMemory(memory, gate), store, counters);
  const create = (submission = SQ, completion = CQ) =>
    controller.createQueue(1, { submission: submission as Iova, completion: completion as Iova, size });
  create();
  let tail = 0;
  let head = 0;
  const add = (fields: Fields) => {
    memory.write(SQ + tail * 64, wire.NvmeCommand.encode({ cid: 7, nsid: 1, ...fields }));
    tail = (tail + 1) % size;
    controller.submit(1, tail);
  };
  /** The entry at the head of the completion queue, whatever its phase. */
  const take = () => {
    const raw = new Uint8Array(16);
    memory.read(CQ + head * 16, raw);
    head = (head + 1) % size;
    controller.complete(1, head);
    const { status, ...entry } = wire.NvmeCompletion.read(raw);
    const phase = wire.phaseOf(status);
    return { ...entry, status: wire.statusOf(status), again: (status & 0x8000) === 0, phase };
  };
  /** One command; its completion. */
  const execute = (fields: Fields) => {
    add(fields);
    assert.equal(controller.run(8).completed, 1);
    return take();
  };
  /** Write a list of entries at `gpa`. */
  const list = (gpa: number, entries: readonly number[]) =>
    entries.forEach((address, i) => {
      memory.write(gpa + 8 * i, wire.PrpEntry.encode({ address }));
    });
  return { memory, forbidden, counters, controller, store, create, add, take, execute, list };
}
type Rig = ReturnType<typeof setUp>;

test("a completion names queue, head and command, and its phase changes with every round", () => {
  const { execute } = setUp();
  const seen = Array.from({ length: 9 }, (_, i) => execute({ opcode: FLUSH, cid: 100 + i }));
  assert.deepEqual(seen[0], {
    dw0: 0,
    dw1: 0,
    sqHead: 1,
    sqId: 1,
    cid: 100,
    status: 0,
    again: true,
    phase: 1,
  });
  assert.deepEqual(
    seen.map((c) => c.phase),
    [1, 1, 1, 1, 0, 0, 0, 0, 1],
  );
  assert.deepEqual(
    seen.map((c) => c.sqHead),
    [1, 2, 3, 0, 1, 2, 3, 0, 1],
  );
});

/** Byte `i` of the transfer lies at `address(i)`: each layout of a data pointer that the standard names. */
const P = DATA;
const layouts: readonly [string, number, (r: Rig) => Fields, (i: number) => number][] = [
  ["in one page", 512, () => ({ prp1: P, prp2: 3 }), (i) => P + i],
  ["at an offset in one page", 1024, () => ({ prp1: P + 0xc00 }), (i) => P + 0xc00 + i],
  ["exactly one page", 4096, () => ({ prp1: P, prp2: 1 }), (i) => P + i],
  [
    "one page over two",
    4096,
    () => ({ prp1: P + 4, prp2: P + 0x3000 }),
    (i) => (i < 4092 ? P + 4 + i : P + 0x3000 + i - 4092),
  ],
  [
    "exactly two pages",
    8192,
    () => ({ prp1: P, prp2: P + 0x5000 }),
    (i) => (i < 4096 ? P + i : P + 0x4000 + i),
  ],
  [
    "two pages at an offset: a list of two",
    8192,
    (r) => {
      r.list(LIST, [P + 0x8000, P + 0x2000]);
      return { prp1: P + 0x200, prp2: LIST };
    },
    (i) => (i < 3584 ? P + 0x200 + i : i < 7680 ? P + 0x8000 + i - 3584 : P + 0x2000 + i - 7680),
  ],
  [
    "a list that ends with its page",
    3 * 4096,
    (r) => {
      r.list(LIST + 0xff0, [P + 0x2000, P + 0x1000]);
      return { prp1: P, prp2: LIST + 0xff0 };
    },
    (i) => (i < 4096 ? P + i : i < 8192 ? P + 0x2000 + i - 4096 : P + 0x1000 + i - 8192),
  ],
  [
    "a list whose first page holds only the pointer to the next",
    3 * 4096,
    (r) => {
      r.list(LIST + 0xff8, [LIST + 0x1000]);
      r.list(LIST + 0x1000, [P + 0x2000, P + 0x1000]);
      return { prp1: P, prp2: LIST + 0xff8 };
    },
    (i) => (i < 4096 ? P + i : i < 8192 ? P + 0x2000 + i - 4096 : P + 0x1000 + i - 8192),
  ],
  [
    "1,024 pages: two lists, chained",
    NVME_TRANSFER_MAX,
    (r) => {
      // Descending pages, so that none joins its neighbour.
      const page = (i: number) => P + 4096 * (1023 - i);
      const rest = Array.from({ length: 1023 }, (_, i) => page(i + 1));
      r.list(LIST, [...rest.slice(0, 511), LIST + 0x2000]);
      r.list(LIST + 0x2000, [...rest.slice(511, 1023)]);
      return { prp1: page(0), prp2: LIST };
    },
    (i) => P + 4096 * (1023 - Math.floor(i / 4096)) + (i % 4096),
  ],
];
for (const [what, length, point, address] of layouts)
  test(`data pointer: ${what}`, () => {
    const r = setUp();
    const fields = { ...point(r), slba: 5, nlb: length / 512 - 1 };
    const data = new Uint8Array(length);
    stamp(data, 1, 1);
    r.store.write(5 * 512, data);
    assert.equal(r.execute({ opcode: READ, ...fields }).status, wire.NVME_SUCCESS);
    const { bytes } = r.memory.regions[0]!;
    for (let i = 0; i < length; i++) if (bytes[address(i)] !== data[i]) assert.fail(`byte ${i} is wrong`);
    for (let i = 0; i < length; i++) bytes[address(i)]! ^= 0xff;
    assert.equal(r.execute({ opcode: WRITE, ...fields }).status, wire.NVME_SUCCESS);
    const back = new Uint8Array(length);
    r.store.read(5 * 512, back);
    assert.ok(back.every((byte, i) => byte === (data[i]! ^ 0xff)));
    assert.deepEqual([r.counters.bytes, r.counters.faults, r.counters.errors], [2 * length, 0, 0]);
  });

const BIG = 2 ** 52;
const refusals: readonly [string, Fields, number][] = [
  ["an opcode that does not exist", { opcode: 0x55 }, wire.NVME_INVALID_OPCODE],
  ["a fused command", { opcode: READ, flags: 1 }, wire.NVME_INVALID_FIELD],
  ["an SGL", { opcode: READ, flags: 0x40 }, wire.NVME_INVALID_FIELD],
  ["another namespace", { opcode: READ, nsid: 2 }, wire.NVME_INVALID_NAMESPACE],
  ["all namespaces, to read", { opcode: READ, nsid: 0xffff_ffff }, wire.NVME_INVALID_NAMESPACE],
  ["more than MDTS", { opcode: READ, prp1: P, nlb: NVME_TRANSFER_MAX / 512 }, wire.NVME_INVALID_FIELD],
  ["the block behind the last", { opcode: WRITE, prp1: P, slba: BLOCKS }, wire.NVME_LBA_OUT_OF_RANGE],
  [
    "a block beyond all numbers",
    { opcode: WRITE, prp1: P, slba: 2 ** 64 - 2 ** 11 },
    wire.NVME_LBA_OUT_OF_RANGE,
  ],
  ["over the end", { opcode: READ, prp1: P, slba: BLOCKS - 1, nlb: 1 }, wire.NVME_LBA_OUT_OF_RANGE],
  ["PRP1 within a dword", { opcode: READ, prp1: P + 2 }, wire.NVME_PRP_OFFSET_INVALID],
  ["PRP2 at an offset", { opcode: READ, prp1: P + 0xe00, prp2: P + 4, nlb: 1 }, wire.NVME_PRP_OFFSET_INVALID],
  ["a list within a qword", { opcode: READ, prp1: P, prp2: LIST + 4, nlb: 23 }, wire.NVME_PRP_OFFSET_INVALID],
  ["a list entry at an offset", { opcode: READ, prp1: P, prp2: LIST, nlb: 23 }, wire.NVME_PRP_OFFSET_INVALID],
  ["a page that is no RAM", { opcode: READ, prp1: BIG }, wire.NVME_DATA_TRANSFER_ERROR],
  ["a list that is no RAM", { opcode: READ, prp1: P, prp2: BIG, nlb: 23 }, wire.NVME_DATA_TRANSFER_ERROR],
];
for (const [what, fields, status] of refusals)
  test(`refused: ${what}`, () => {
    const { execute, counters, list } = setUp();
    list(LIST, [P + 0x1000, P + 0x2008]);
    assert.deepEqual([execute(fields).status, counters.faults, counters.errors], [status, 0, 1]);
    assert.equal(execute({ opcode: READ, prp1: P }).status, wire.NVME_SUCCESS);
  });

test("what the guest did wrong is not to be retried; a DMA fault may be", () => {
  const { execute, forbidden } = setUp();
  assert.equal(execute({ opcode: READ, prp1: P + 1 }).again, false);
  forbidden.add(P);
  assert.equal(execute({ opcode: READ, prp1: P }).again, true);
});

for (const [what, frame, point] of [
  ["the first page", P, { prp1: P, prp2: LIST }],
  ["the PRP list", LIST, { prp1: P, prp2: LIST }],
  ["a page of the list", P + 0x2000, { prp1: P, prp2: LIST }],
] as const)
  test(`DMA fault at ${what}: a Data Transfer Error, counted, and the queue goes on`, () => {
    const { execute, forbidden, counters, list } = setUp();
    list(LIST, [P + 0x2000, P + 0x1000]);
    forbidden.add(frame);
    assert.equal(execute({ opcode: READ, nlb: 23, ...point }).status, wire.NVME_DATA_TRANSFER_ERROR);
    assert.deepEqual([counters.faults, counters.errors, counters.requests], [1, 0, 1]);
    forbidden.clear();
    assert.equal(execute({ opcode: READ, nlb: 23, ...point }).status, wire.NVME_SUCCESS);
  });

for (const [what, frame] of [
  ["submission queue", SQ],
  ["completion queue", CQ],
] as const)
  test(`DMA fault at the ${what}: counted, and each command is executed exactly once in the end`, () => {
    const { add, take, controller, forbidden, counters, memory, store } = setUp();
    const block = new Uint8Array(512);
    stamp(block, 9, 9);
    memory.write(P, block);
    add({ opcode: WRITE, prp1: P, cid: 1 });
    forbidden.add(frame);
    for (let i = 1; i <= 3; i++) {
      assert.deepEqual(controller.run(8), { completed: 0, more: false });
      assert.equal(counters.faults, i);
    }
    forbidden.clear();
    assert.deepEqual(controller.run(8), { completed: 1, more: false });
    assert.deepEqual([take().cid, counters.transfers, counters.requests], [1, 1, 1]);
    store.read(0, block);
    assert.ok(isStamped(block, 9, 9));
  });

test("rings that are no RAM: one error, and nothing more of this queue", () => {
  const { controller, create, counters } = setUp();
  create(2 ** 40);
  controller.submit(1, 1);
  for (let i = 0; i < 3; i++) assert.deepEqual(controller.run(8), { completed: 0, more: false });
  assert.equal(counters.errors, 1);
});

test("no more than the limit, no more than the completion queue holds, and more when there is room", () => {
  const { add, take, controller } = setUp();
  for (let i = 0; i < 3; i++) add({ opcode: FLUSH, cid: i });
  assert.deepEqual(controller.run(2), { completed: 2, more: true });
  assert.deepEqual(controller.run(2), { completed: 1, more: false });
  add({ opcode: FLUSH, cid: 3 });
  assert.deepEqual(controller.run(2), { completed: 0, more: false });
  assert.equal(take().cid, 0);
  assert.deepEqual(controller.run(2), { completed: 1, more: false });
});

test("a busy queue does not starve another", () => {
  const { add, controller, memory } = setUp();
  controller.createQueue(2, { submission: 0x5000 as Iova, completion: 0x6000 as Iova, size: 4 });
  memory.write(0x5000, wire.NvmeCommand.encode({ opcode: FLUSH, cid: 50, nsid: 0xffff_ffff }));
  controller.submit(2, 1);
  for (let i = 0; i < 3; i++) add({ opcode: FLUSH, cid: i });
  controller.run(1);
  controller.run(1);
  assert.equal(memory.load16(0x6000 + 12), 50);
});

for (const [what, ring] of [
  ["a tail out of range", (c: NvmeController) => c.submit(1, 4)],
  ["a negative tail", (c: NvmeController) => c.submit(1, -1)],
  ["a tail that goes back", (c: NvmeController) => c.submit(1, 0)],
  ["the tail of a queue that does not exist", (c: NvmeController) => c.submit(2, 1)],
  ["a head out of range", (c: NvmeController) => c.complete(1, 4)],
  ["a head beyond what was posted", (c: NvmeController) => c.complete(1, 1)],
] as const)
  test(`an invalid doorbell is counted and ignored: ${what}`, () => {
    const { add, controller, counters } = setUp();
    add({ opcode: FLUSH });
    ring(controller);
    assert.equal(counters.errors, 1);
    assert.equal(controller.run(8).completed, 1);
  });

test("a deleted queue is not served, and its doorbells are invalid", () => {
  const { add, controller, counters, create } = setUp();
  add({ opcode: FLUSH });
  controller.deleteQueue(1);
  controller.submit(1, 2);
  assert.deepEqual([controller.run(8), counters.errors], [{ completed: 0, more: false }, 1]);
  create();
  controller.submit(1, 1);
  assert.equal(controller.run(8).completed, 1);
});

test("contiguous pages are moved together, but no DMA window is long", () => {
  const { execute, counters } = setUp();
  execute({ opcode: READ, prp1: P, prp2: P + 4096, nlb: 15 });
  assert.equal(counters.transfers, 1);
  const { execute: again, counters: count, list } = setUp();
  list(
    LIST,
    Array.from({ length: 63 }, (_, i) => P + 4096 * (i + 1)),
  );
  again({ opcode: READ, prp1: P, prp2: LIST, nlb: 511 });
  assert.deepEqual([count.transfers, count.bytes], [4, 2 ** 18]);
});

test("what the host refuses is a media error, by errno", () => {
  class Bad extends MemoryStore {
    override read(): void {
      throw new HostError("read", "EIO");
    }
    override write(): void {
      throw new HostError("write", "ENOSPC");
    }
    override flush(): void {
      throw new HostError("fdatasync", "EIO");
    }
  }
  const { execute, controller } = setUp({ store: new Bad(BLOCKS) });
  assert.equal(execute({ opcode: READ, prp1: P }).status, wire.NVME_UNRECOVERED_READ_ERROR);
  assert.equal(execute({ opcode: WRITE, prp1: P }).status, wire.NVME_WRITE_FAULT);
  assert.equal(execute({ opcode: FLUSH }).status, wire.NVME_INTERNAL_ERROR);
  assert.deepEqual(
    [...controller.hostErrors],
    [
      ["EIO", 2],
      ["ENOSPC", 1],
    ],
  );
});

test("Force Unit Access flushes", () => {
  let flushes = 0;
  class Counted extends MemoryStore {
    override flush(): void {
      flushes++;
    }
  }
  const { execute } = setUp({ store: new Counted(BLOCKS) });
  execute({ opcode: WRITE, prp1: P });
  execute({ opcode: WRITE, prp1: P, control: wire.NVME_CONTROL_FUA });
  assert.equal(flushes, 1);
});

for (let seed = 1; seed <= 8; seed++)
  test(`hostile commands and lists: each gets one answer, nothing else happens (seed ${seed})`, () => {
    const next = random(seed);
    const { memory, forbidden, execute } = setUp();
    const address = () =>
      [P + next(2 ** 22), next(2 ** 32), next(2 ** 31) * 2 ** 33, LIST + 8 * next(1024)][next(4)]!;
    for (let i = 0; i < 300; i++) {
      for (let e = 0; e < 8; e++) {
        // Lists that lead to themselves, to the rings, to nowhere.
        const entry = next(3) === 0 ? address() : [SQ, CQ, LIST, LIST + 0x1000, P][next(5)]!;
        memory.write(LIST + 8 * next(1024), wire.PrpEntry.encode({ address: entry }));
      }
      forbidden.clear();
      if (next(2)) forbidden.add(P + 4096 * next(1024)).add(LIST);
      const opcode = next(4) === 0 ? next(256) : READ + next(2);
      const slba = next(2) ? next(BLOCKS) : next(2 ** 32) * 2 ** next(32);
      const cid = next(2 ** 16);
      const wrong = next(4) === 0 ? { flags: next(256), nsid: next(3), control: next(2 ** 16) } : {};
      // A command may overwrite the rings themselves: only that it is answered is promised.
      execute({ opcode, cid, slba, nlb: next(2 ** next(17)), prp1: address(), prp2: address(), ...wrong });
    }
  });
