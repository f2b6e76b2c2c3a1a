import assert from "node:assert/strict";
import test from "node:test";
import { FakeClock } from "../../test/support/clock.ts";
import { machine, RAM_FRAMES } from "../../test/support/machine.ts";
import { DISK, NOMEM, RANGE } from "../../test/support/viommu.ts";
import { type Bdf, FRAME_SIZE, type Gfn, type Gpa, gfnOf, milliseconds } from "../base/units.ts";
import { counters, countersBuffer } from "../memory/counters.ts";
import type { DmaAccess } from "../memory/guest-memory.ts";
import { VirtioIommu } from "../virtio/iommu.ts";
import { VirtioPciFunction } from "../virtio/pci.ts";
import { DRIVER_COUNTERS } from "./counters.ts";
import { DmaMapFailed } from "./dma-api.ts";
import { FramePool, RunPool } from "./pages.ts";
import { LazyQueue, RemappedDma } from "./remapped-dma.ts";
import { GuestDriver } from "./viommu.ts";

const endpoint = DISK as Bdf;
const DOMAIN = 3;
const FIRST = 2 ** 20;
const gpa = (frame: number, offset = 0) => (frame * FRAME_SIZE + offset) as Gpa;

/** A guest on one CPU whose disk is attached to a domain, over the real device and tracker, and a fake host. */
function guest(options: { quota?: number; lazy?: boolean; addresses?: number } = {}) {
  const m = machine(options);
  const device = new VirtioIommu({
    memory: m.memory,
    tracker: m.tracker,
    assigned: new Map([[endpoint, 0]]),
    pinPage: true,
    hostError: (error) => assert.fail(error),
  });
  const count = counters(DRIVER_COUNTERS, countersBuffer(DRIVER_COUNTERS));
  const pages = new FramePool(m.memory, 1024 as Gfn, 512);
  const on = {
    ...{ memory: m.memory, pciFunction: new VirtioPciFunction(device, m.memory), counters: count },
    cpu: { waitFor: (done: () => boolean) => done() },
  };
  const { domains } = GuestDriver.activate(on, pages, 1);
  domains.attach(DOMAIN, endpoint);
  const lazyClock = new FakeClock(0, 0);
  const dma = new RemappedDma({
    ...{ requests: domains, domain: DOMAIN, pages, counters: count },
    iovas: new RunPool(FIRST, options.addresses ?? 600),
    ...(options.lazy && { lazy: { clock: lazyClock, queue: new LazyQueue() } }),
  });
  const reach = (access: DmaAccess, ...iovas: number[]) =>
    iovas.map((iova) => m.gate.translate(gfnOf(iova), access));
  return { ...m, lazyClock, count, dma, reach };
}

const noAddress = (error: unknown) => error instanceof DmaMapFailed && error.reason === "no-memory";
const refused = (status: number) => (error: unknown) =>
  error instanceof DmaMapFailed && error.reason === "refused" && error.status === status;

test("a buffer has addresses of its own until it is unmapped, and keeps its offset", () => {
  const { dma, reach, tracker, count } = guest();
  const iova = dma.mapSingle(gpa(5, 100), 4096, "bidirectional");
  assert.equal(iova % FRAME_SIZE, 100);
  assert.deepEqual(reach("write", iova, iova + 4096, iova + 8192, gpa(5)), [5, 6, -1, -1]);
  assert.equal(tracker.pinned, 2);
  dma.unmapSingle(iova, 4096, "bidirectional");
  assert.deepEqual([...reach("write", iova, iova + 4096), tracker.pinned], [-1, -1, 0]);
  assert.deepEqual([count.map, count.unmap, count.framesMapped, count.framesUnmapped], [1, 1, 2, 2]);
});

for (const [direction, read, write] of [
  ["to-device", 5, -1],
  ["from-device", -1, 5],
  ["bidirectional", 5, 5],
] as const)
  test(`a device may ${[read > 0 && "read", write > 0 && "write"].filter(Boolean).join(" and ")} what is mapped ${direction}`, () => {
    const { dma, reach } = guest();
    const iova = dma.mapSingle(gpa(5), 1, direction);
    assert.deepEqual([...reach("read", iova), ...reach("write", iova)], [read, write]);
  });

test("a scatter list is one run of addresses; neighbours in memory go in one request", () => {
  const { dma, reach, count, tracker } = guest();
  const list = [
    { gpa: gpa(5, 4000), length: 96 },
    { gpa: gpa(6), length: 4096 },
    { gpa: gpa(6), length: 512 },
    { gpa: gpa(9), length: 8192 },
  ];
  const segments = dma.mapSg(list, "bidirectional");
  const [first] = segments;
  assert.deepEqual(
    segments.map(({ iova, length }) => [iova - gfnOf(first!.iova) * FRAME_SIZE, length]),
    [
      [4000, 96],
      [4096, 4096],
      [8192, 512],
      [12288, 8192],
    ],
  );
  assert.deepEqual(reach("read", ...segments.map((s) => s.iova), first!.iova + 4 * 4096), [5, 6, 6, 9, 10]);
  assert.deepEqual([count.mapRequests, tracker.pinned], [3, 4]);
  dma.unmapSg(segments, "bidirectional");
  assert.deepEqual([count.unmapRequests, tracker.pinned], [1, 0]);
  assert.deepEqual(dma.mapSg([], "to-device"), []);
  dma.unmapSg([], "to-device");
});

test("a list of which a piece is refused is not mapped at all, and its addresses are used again", () => {
  const { dma, tracker, count } = guest({ addresses: 2 });
  const list = [5, RAM_FRAMES].map((frame) => ({ gpa: gpa(frame), length: 1 }));
  for (let i = 0; i < 3; i++) assert.throws(() => dma.mapSg(list, "bidirectional"), refused(RANGE));
  assert.deepEqual([tracker.pinned, count.mapFailed, count.map, count.unmapFailed], [0, 3, 0, 0]);
});

test("at the quota, and without addresses, a mapping fails and leaves nothing", () => {
  const { dma, tracker } = guest({ quota: 2, addresses: 4 });
  assert.throws(() => dma.mapSingle(gpa(5), 3 * 4096, "bidirectional"), refused(NOMEM));
  assert.equal(tracker.pinned, 0);
  assert.throws(() => dma.mapSingle(gpa(5), 5 * 4096, "bidirectional"), noAddress);
});

test("memory that both share is mapped, and given back", () => {
  const { dma, tracker, reach } = guest();
  const { gpa: at, iova } = dma.allocCoherent(5000);
  assert.deepEqual(reach("write", iova, iova + 4096), [gfnOf(at), gfnOf(at) + 1]);
  dma.freeCoherent(at, iova, 5000);
  assert.equal(tracker.pinned, 0);
});

test("lazy: the device keeps what is unmapped until 10 ms have passed, then neighbours go in one request", () => {
  const { dma, tracker, reach, count, lazyClock } = guest({ lazy: true });
  const iovas = [5, 6, 7].map((frame) => dma.mapSingle(gpa(frame), 4096, "bidirectional"));
  for (const iova of iovas) dma.unmapSingle(iova, 4096, "bidirectional");
  lazyClock.time += milliseconds(9);
  dma.tick();
  assert.deepEqual([...reach("read", ...iovas), tracker.pinned, count.unmapRequests], [5, 6, 7, 3, 0]);
  lazyClock.time += milliseconds(1);
  dma.tick();
  assert.deepEqual([...reach("read", ...iovas), tracker.pinned, count.unmapRequests], [-1, -1, -1, 0, 1]);
  dma.tick(true);
  assert.equal(count.unmapRequests, 1, "there is nothing to take back");
});

test("lazy: the 251st unmap takes the 250 before it back", () => {
  const { dma, tracker, count } = guest({ lazy: true });
  for (let i = 0; i < 251; i++) {
    dma.unmapSingle(dma.mapSingle(gpa(i), 4096, "bidirectional"), 4096, "bidirectional");
    assert.equal(count.unmapRequests, Number(i === 250));
  }
  assert.equal(tracker.pinned, 1);
  dma.tick(true);
  assert.equal(tracker.pinned, 0);
});

test("addresses that a stuck device does not let go of are not used again", () => {
  const { dma, gate, clock, tracker, count, reach } = guest({ addresses: 1 });
  clock.step = milliseconds(1);
  const iova = dma.mapSingle(gpa(5), 4096, "bidirectional");
  gate.enter();
  dma.unmapSingle(iova, 4096, "bidirectional");
  gate.leave();
  assert.deepEqual([count.unmapFailed, tracker.pinned, ...reach("read", iova)], [1, 1, 5]);
  assert.throws(() => dma.mapSingle(gpa(6), 1, "bidirectional"), noAddress);
});
