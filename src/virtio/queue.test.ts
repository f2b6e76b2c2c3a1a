import assert from "node:assert/strict";
import test from "node:test";
import { ram, ramRegion } from "../../test/support/guest.ts";
import { type Gfn, type Gpa, gfnOf } from "../base/units.ts";
import { GatedMemory, NO_FRAME } from "../memory/gated-memory.ts";
import { GuestMemory } from "../memory/guest-memory.ts";
import {
  Desc,
  VIRTQ_DESC_F_INDIRECT as INDIRECT,
  VIRTQ_DESC_F_NEXT as NEXT,
  VIRTQ_AVAIL_F_NO_INTERRUPT,
  VIRTQ_DESC_F_WRITE as WRITE,
} from "../wire/virtqueue.ts";
import { DriverQueue, layoutAt } from "./driver-queue.ts";
import { type Buffer, type Chain, lengthOf, MalformedChain, type QueueLayout, SplitQueue } from "./queue.ts";

const PROTOCOL = { code: "ERR_COIOMMU_PROTOCOL" };
const NOT_RAM = { code: "ERR_COIOMMU_NOT_GUEST_RAM" };
const SIZE = 8;
const TABLE = 0x5000; // of indirect descriptors
const DATA = 0x8000;

function queue({ size = SIZE, indirect = true, memory = ram(16) } = {}) {
  const layout = layoutAt(0, size);
  return {
    memory,
    layout,
    driver: new DriverQueue(memory, layout),
    device: new SplitQueue(memory, layout, { indirect }),
    /** An entry of the table for indirect descriptors. */
    indirectEntry: (index: number, desc: { addr: number; len: number; flags: number; next?: number }) =>
      memory.write(TABLE + 16 * index, Desc.encode(desc)),
  };
}
const buffer = (gpa: number, length: number): Buffer => ({ gpa: gpa as Gpa, length });
const readable = [buffer(DATA, 16), buffer(DATA + 64, 8)];
const writable = [buffer(DATA + 128, 4)];

function popped(device: SplitQueue): Chain {
  const chain = device.pop();
  assert.ok(chain);
  return chain;
}

// --- a driver that keeps the rules -------------------------------------------------------------------------------

test("an empty queue gives nothing", () => assert.equal(queue().device.pop(), undefined));

for (const indirectAt of [undefined, TABLE])
  test(`a chain arrives with its buffers, ${indirectAt ? "from an indirect table" : "descriptor by descriptor"}`, () => {
    const { driver, device } = queue();
    const head = driver.add(readable, writable, indirectAt);
    assert.deepEqual(device.pop(), { head, readable, writable });
    assert.equal(device.pop(), undefined);
  });

test("chains arrive in the order of the available ring, and go back in the order of push, with what was written", () => {
  const { driver, device } = queue();
  const heads = [1, 2, 3].map((n) => driver.add([buffer(DATA, n)], []));
  const chains = heads.map(() => popped(device));
  assert.deepEqual(
    chains.map((c) => [c.head, lengthOf(c.readable)]),
    heads.map((head, i) => [head, i + 1]),
  );
  assert.equal(driver.poll(), undefined);
  for (const [i, chain] of chains.reverse().entries()) device.push(chain.head, 100 + i);
  const back = [driver.poll(), driver.poll(), driver.poll()];
  assert.deepEqual(
    back,
    heads.reverse().map((head, i) => ({ head, written: 100 + i })),
  );
  assert.equal(driver.poll(), undefined);
});

test("all descriptors can be offered at once", () => {
  const { driver, device } = queue();
  for (let i = 0; i < SIZE; i++) driver.add([buffer(DATA, i + 1)], []);
  for (let i = 0; i < SIZE; i++) assert.equal(lengthOf(popped(device).readable), i + 1);
});

test("a chain may be as long as the queue, also in an indirect table", () => {
  for (const indirectAt of [undefined, TABLE]) {
    const { driver, device } = queue();
    const whole = Array.from({ length: SIZE }, (_, i) => buffer(DATA + 16 * i, 16));
    driver.add(whole, [], indirectAt);
    assert.deepEqual(popped(device).readable, whole);
  }
});

test("the indices wrap at 65,536", () => {
  const { driver, device } = queue({ size: 2 });
  for (let i = 0; i < 65_536 + 10; i++) {
    const head = driver.add([buffer(DATA, 1)], []);
    const chain = device.pop();
    if (chain?.head !== head) assert.fail(`chain ${i} is lost`);
    device.push(head, i);
    if (driver.poll()?.written !== i) assert.fail(`answer ${i} is lost`);
  }
  assert.equal(device.next, 10);
});

test("a device that takes over goes on at `next`, in both rings", () => {
  const { driver, device, memory, layout } = queue();
  device.push(driver.add(readable, []), 0);
  popped(device);
  const head = driver.add(readable, writable);
  const second = new SplitQueue(memory, layout, { indirect: true, next: device.next });
  assert.equal(popped(second).head, head);
  second.push(head, 4);
  driver.poll();
  assert.deepEqual(driver.poll(), { head, written: 4 });
});

test("the driver says whether it wants interrupts", () => {
  const { device, memory, layout } = queue();
  assert.equal(device.needsInterrupt(), true);
  memory.store16(layout.driver, VIRTQ_AVAIL_F_NO_INTERRUPT);
  assert.equal(device.needsInterrupt(), false);
});

test("a queue needs no descriptors in whole frames: layouts are as VIRTIO 1.2 section 2.7 sizes them", () => {
  const layout = layoutAt(0x1000, 64);
  assert.deepEqual(
    [layout.desc, layout.driver, layout.device, layout.bytes],
    [0x1000, 0x1400, 0x1484, 0x1000],
  );
  assert.deepEqual(
    SplitQueue.extents(layout).map((e) => [e.gpa, e.length]),
    [
      [0x1000, 1024],
      [0x1400, 132],
      [0x1484, 516],
    ],
  );
});

// --- hostile chains: consumed, to be answered with length 0 --------------------------------------------------------

type Rig = ReturnType<typeof queue>;
const at = (addr: number, len: number, flags = 0, next = 0) => ({ addr, len, flags, next });

const malformed: Record<string, { indirect?: boolean; offer: (rig: Rig) => void }> = {
  "a descriptor that is its own next": { offer: (q) => q.driver.describe(0, at(DATA, 1, NEXT, 0)) },
  "a cycle of two": {
    offer: (q) => {
      q.driver.describe(0, at(DATA, 1, NEXT, 1));
      q.driver.describe(1, at(DATA, 1, NEXT, 0));
    },
  },
  "a next that is out of range by one": { offer: (q) => q.driver.describe(0, at(DATA, 1, NEXT, SIZE)) },
  "a next of 65,535": { offer: (q) => q.driver.describe(0, at(DATA, 1, NEXT, 0xffff)) },
  "a readable buffer after a writable one": {
    offer: (q) => {
      q.driver.describe(0, at(DATA, 1, WRITE | NEXT, 1));
      q.driver.describe(1, at(DATA, 1));
    },
  },
  "an indirect table that was not negotiated": {
    indirect: false,
    offer: (q) => {
      q.indirectEntry(0, at(DATA, 1));
      q.driver.describe(0, at(TABLE, 16, INDIRECT));
    },
  },
  "an indirect table in an indirect table": {
    offer: (q) => {
      q.indirectEntry(0, at(TABLE, 16, INDIRECT));
      q.driver.describe(0, at(TABLE, 16, INDIRECT));
    },
  },
  "INDIRECT together with NEXT": {
    offer: (q) => {
      q.indirectEntry(0, at(DATA, 1));
      q.driver.describe(0, at(TABLE, 16, INDIRECT | NEXT, 1));
      q.driver.describe(1, at(DATA, 1));
    },
  },
  "an indirect table of no bytes": { offer: (q) => q.driver.describe(0, at(TABLE, 0, INDIRECT)) },
  "an indirect table of one and a half entries": {
    offer: (q) => q.driver.describe(0, at(TABLE, 24, INDIRECT)),
  },
  "a next beyond its indirect table": {
    offer: (q) => {
      q.indirectEntry(0, at(DATA, 1, NEXT, 1));
      q.driver.describe(0, at(TABLE, 16, INDIRECT));
    },
  },
  "a cycle in an indirect table": {
    offer: (q) => {
      q.indirectEntry(0, at(DATA, 1, NEXT, 0));
      q.driver.describe(0, at(TABLE, 16, INDIRECT));
    },
  },
  "a chain in an indirect table that is longer than the queue": {
    offer: (q) => {
      for (let i = 0; i <= SIZE; i++) q.indirectEntry(i, at(DATA, 1, i < SIZE ? NEXT : 0, i + 1));
      q.driver.describe(0, at(TABLE, 16 * (SIZE + 1), INDIRECT));
    },
  },
  "an indirect table outside RAM": { offer: (q) => q.driver.describe(0, at(0xff_0000, 16, INDIRECT)) },
  "an indirect table at 2^64 - 16, of 4 GiB": {
    offer: (q) => q.driver.describe(0, at(2 ** 64 - 2048, 0xffff_fff0, INDIRECT)),
  },
};
for (const [what, { indirect = true, offer }] of Object.entries(malformed))
  test(`${what}: the chain is refused by its head, and the next one is served`, () => {
    const q = queue({ indirect });
    offer(q);
    q.driver.offer(0);
    q.driver.describe(7, at(DATA, 3));
    q.driver.offer(7);
    assert.throws(
      () => q.device.pop(),
      (error) => error instanceof MalformedChain && error.head === 0,
    );
    assert.equal(lengthOf(popped(q.device).readable), 3);
  });

test("buffers are passed on unread, wherever they claim to be: the device's accesses are checked", () => {
  const { driver, device } = queue();
  driver.add([buffer(2 ** 63, 0xffff_ffff)], [buffer(DATA, 0)]);
  const chain = popped(device);
  assert.ok(chain.readable[0]!.gpa >= 2 ** 53);
  assert.deepEqual([lengthOf(chain.readable), lengthOf(chain.writable)], [0xffff_ffff, 0]);
});

// --- hostile rings: the device needs a reset --------------------------------------------------------------------------

for (const [what, offer] of [
  ["a head that is out of range by one", (q: Rig) => q.driver.offer(SIZE)],
  ["a head of 65,535", (q: Rig) => q.driver.offer(0xffff)],
  ["more available entries than the ring has", (q: Rig) => q.memory.store16(q.layout.driver + 2, SIZE + 1)],
  ["an available index that went back", (q: Rig) => q.memory.store16(q.layout.driver + 2, 0xffff)],
] as const)
  test(`${what}: the ring is broken`, () => {
    const q = queue();
    offer(q);
    assert.throws(
      () => q.device.pop(),
      (error) => !(error instanceof MalformedChain) && (error as { code?: string }).code === PROTOCOL.code,
    );
  });

const outside = 0x10_0000 as Gpa;
for (const part of ["desc", "driver", "device"] as const)
  test(`a ring whose ${part} part is outside RAM fails in the access`, () => {
    const { memory, layout, driver } = queue();
    driver.add(readable, []);
    const device = new SplitQueue(memory, { ...layout, [part]: outside }, { indirect: false });
    assert.throws(() => {
      device.pop();
      device.push(0, 0);
    }, NOT_RAM);
  });

const aligned = layoutAt(0, SIZE);
for (const [what, layout] of [
  ["no descriptors", { ...aligned, size: 0 }],
  ["a size that is no power of two", { ...aligned, size: 12 }],
  ["65,536 descriptors", { ...aligned, size: 65_536 }],
  ["a negative size", { ...aligned, size: -8 }],
  ["descriptors at an odd multiple of 8", { ...aligned, desc: 8 as Gpa }],
  ["an available ring at an odd address", { ...aligned, driver: 129 as Gpa }],
  ["a used ring at an odd multiple of 2", { ...aligned, device: 158 as Gpa }],
] as [string, QueueLayout][])
  test(`a layout with ${what} is refused`, () =>
    assert.throws(() => new SplitQueue(ram(16), layout, { indirect: false }), PROTOCOL));

// --- behind an IOMMU --------------------------------------------------------------------------------------------------

test("after a DMA fault the entry stays, and a later pop serves it once the frame is mapped", () => {
  const memory = ram(16);
  const mapped = new Set<Gfn>();
  const gate = {
    enter() {},
    leave() {},
    translate: (page: number) => (mapped.has(page as Gfn) ? (page as Gfn) : NO_FRAME),
    request: () => false,
    fault() {},
  };
  const layout = { ...layoutAt(0, SIZE), desc: 0x2000 as Gpa };
  const driver = new DriverQueue(memory, layout);
  const device = new SplitQueue(new GatedMemory(memory, gate), layout, { indirect: true });
  const head = driver.add(readable, writable, TABLE);
  // The available ring's index, the descriptor, and the indirect table.
  for (const gpa of [layout.driver + 2, layout.desc, TABLE]) {
    assert.throws(() => device.pop(), { code: "ERR_COIOMMU_DMA_FAULT", gpa });
    assert.equal(device.next, 0);
    mapped.add(gfnOf(gpa));
  }
  assert.deepEqual(device.pop(), { head, readable, writable });
  // The same for push: the used index moves only with its element.
  mapped.clear();
  assert.throws(() => device.push(head, 4), { code: "ERR_COIOMMU_DMA_FAULT" });
  assert.equal(driver.poll(), undefined);
  mapped.add(0 as Gfn);
  device.push(head, 4);
  assert.deepEqual(driver.poll(), { head, written: 4 });
});

test("a ring that lies across two adjacent regions works", () => {
  const memory = new GuestMemory([ramRegion(0, 1), ramRegion(0x1000, 15)]);
  const layout = layoutAt(0x1000 - 0x200, 64);
  const driver = new DriverQueue(memory, layout);
  const device = new SplitQueue(memory, layout, { indirect: false });
  for (let i = 0; i < 200; i++) {
    const head = driver.add(readable, writable);
    assert.deepEqual(device.pop(), { head, readable, writable });
    device.push(head, 1);
    assert.equal(driver.poll()?.head, head);
  }
});
