import assert from "node:assert/strict";
import test from "node:test";
import type { Gfn, Gpa } from "../base/units.ts";
import { type DmaGate, GatedMemory, NO_FRAME } from "../memory/gated-memory.ts";
import { GuestMemory } from "../memory/guest-memory.ts";
import { DriverQueue } from "../virtio/driver-queue.ts";
import { type Chain, SplitQueue } from "../virtio/queue.ts";
import { QueueRunner } from "./queue-runner.ts";

/** Each part of the ring in a frame of its own, behind an IOMMU that forbids `forbidden`. */
function setUp(handle: (chain: Chain) => number = () => 1) {
  const bytes = new Uint8Array(0x8000);
  const memory = new GuestMemory([{ gpa: 0 as Gpa, size: bytes.length, hostAddress: 0, bytes }]);
  const forbidden = new Set<Gfn>();
  const gate: DmaGate = {
    enter() {},
    leave() {},
    translate: (page) => (forbidden.has(page as Gfn) ? NO_FRAME : (page as Gfn)),
    request: () => false,
    fault() {},
  };
  const layout = { size: 8, desc: 0x1000 as Gpa, driver: 0x2000 as Gpa, device: 0x3000 as Gpa };
  const queue = new SplitQueue(new GatedMemory(memory, gate), layout);
  const counters = { faults: 0, errors: 0 };
  const handled: number[] = [];
  const runner = new QueueRunner(
    queue,
    (chain) => {
      const written = handle(chain);
      handled.push(chain.head);
      return written;
    },
    counters,
  );
  const driver = new DriverQueue(memory, layout);
  const add = () => driver.add([], [{ gpa: 0x4000 as Gpa, length: 4 }]);
  const frame = (gpa: number) => (gpa / 4096) as Gfn;
  return { runner, driver, add, counters, forbidden, handled, frame };
}

for (const [part, gpa] of [
  ["descriptor table", 0x1000],
  ["available ring", 0x2000],
  ["used ring", 0x3000],
] as const)
  test(`${part} not pinned: counted, and each chain is handled exactly once in the end`, () => {
    const { runner, driver, add, counters, forbidden, handled, frame } = setUp();
    const heads = [add(), add()];
    forbidden.add(frame(gpa));
    for (let kick = 1; kick <= 3; kick++) {
      assert.equal(runner.run(8).completed, 0);
      assert.equal(counters.faults, kick);
      assert.equal(runner.base, 0);
    }
    forbidden.clear();
    assert.deepEqual(runner.run(8), { completed: 2, interrupt: true, more: false });
    assert.deepEqual(handled, heads);
    assert.deepEqual([driver.poll()?.head, driver.poll()?.head], heads);
    assert.equal(runner.base, 2);
    assert.equal(counters.errors, 0);
  });

test("no more than the limit in one run, and the caller learns that there may be more", () => {
  const { runner, add } = setUp();
  for (let i = 0; i < 5; i++) add();
  assert.deepEqual(runner.run(3), { completed: 3, interrupt: true, more: true });
  assert.deepEqual(runner.run(3), { completed: 2, interrupt: true, more: false });
  assert.deepEqual(runner.run(3), { completed: 0, interrupt: false, more: false });
});

test("a bug of ours in the handler is not swallowed", () => {
  const { runner, add } = setUp(() => {
    throw new TypeError("bug");
  });
  add();
  assert.throws(() => runner.run(8), TypeError);
});
