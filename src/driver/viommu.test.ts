import assert from "node:assert/strict";
import test from "node:test";
import { type Machine, machine } from "../../test/support/machine.ts";
import { DISK, NIC } from "../../test/support/viommu.ts";
import type { Bdf, Gfn, Gpa } from "../base/units.ts";
import { counters, countersBuffer } from "../memory/counters.ts";
import { VirtioIommu } from "../virtio/iommu.ts";
import { VirtioPciFunction } from "../virtio/pci.ts";
import { TU_ACCESSED as A, TU_DIRTY as D, TU_PINNED as P, TU_WRITABLE as W } from "../wire/dtt.ts";
import { DRIVER_COUNTERS } from "./counters.ts";
import type { Cpu } from "./cpu.ts";
import { DirectDma } from "./dma.ts";
import { DmaMapFailed, type DmaMapFailure } from "./dma-api.ts";
import { FramePool } from "./pages.ts";
import { type DriverCpu, GuestDriver } from "./viommu.ts";

const endpoint = DISK as Bdf;
/** Frames that the guest's allocator hands out. */
const POOL = { first: 1024 as Gfn, frames: 512 };

/** A guest on one CPU, its driver active over the real device and tracker, and a fake host. */
function guest(options: Parameters<typeof machine>[0] = {}, driverOptions: Partial<DriverCpu> = {}) {
  const m = machine(options);
  const device = new VirtioIommu({
    memory: m.memory,
    tracker: m.tracker,
    assigned: new Map([
      [endpoint, 0],
      [NIC as Bdf, 1],
    ]),
    pinPage: true,
    hostError: (error) => assert.fail(error),
  });
  const pciFunction = new VirtioPciFunction(device, m.memory);
  // The device answers within the kick, so whoever still waits waits for ever.
  const cpu: Cpu = { waitFor: (done) => done() };
  const count = counters(DRIVER_COUNTERS, countersBuffer(DRIVER_COUNTERS));
  const on: DriverCpu = { memory: m.memory, pciFunction, cpu, counters: count, ...driverOptions };
  const pages = new FramePool(m.memory, POOL.first, POOL.frames);
  const driver = GuestDriver.activate(on, pages, 1);
  const direct = new DirectDma(pages);
  return {
    ...m,
    driver,
    on,
    pages,
    direct,
    driverCounters: count,
    dma: driver.dma(endpoint, direct),
    device,
  };
}

const failure = (action: () => unknown): DmaMapFailure | undefined => {
  try {
    action();
  } catch (error) {
    if (error instanceof DmaMapFailed) return error.reason;
    throw error;
  }
  return undefined;
};
const gpa = (gfn: number, offset = 0) => (gfn * 4096 + offset) as Gpa;
/** The unit's word; the table has two levels. */
const word = (g: ReturnType<typeof guest>, gfn: number): number => {
  const { root } = g.driver.places.table;
  const leaf = g.memory.load32(root + 8 * Math.floor(gfn / 1024)) & ~1;
  return g.memory.load32(leaf + 4 * (gfn % 1024)) >>> 0;
};
const passes = (m: Machine, count: number) => {
  for (let i = 0; i < count; i++) m.pass();
};

test("the driver finds the assigned functions and turns PIN on", () => {
  const g = guest();
  assert.deepEqual(g.driver.assigned(), [endpoint, NIC]);
  assert.equal(g.tracker.life, "tracked");
  assert.deepEqual(g.driver.survey(), { liveFrames: 0, liveRefs: 0, pinnedFrames: 0 });
});

test("a map pins what is not pinned, an unmap does not ask, two idle passes unpin", () => {
  const g = guest();
  const iova = g.dma.mapSingle(gpa(5, 4000), 200, "from-device");
  assert.deepEqual([word(g, 5), word(g, 6)], [P + A + W + 1, P + A + W + 1]);
  assert.deepEqual(g.held(5, 6, 7), [true, true, false]);
  const again = g.dma.mapSingle(gpa(5), 4096, "to-device");
  assert.equal(g.driverCounters.pinRequests, 1, "the second map finds P set");
  g.dma.unmapSingle(again, 4096, "to-device");
  passes(g, 3);
  assert.deepEqual(g.held(5, 6), [true, true], "mapped frames stay");
  g.dma.unmapSingle(iova, 200, "from-device");
  passes(g, 2);
  assert.deepEqual(g.held(5, 6), [false, false]);
  const { map, unmap, framesMapped, framesUnmapped, underflow } = g.driverCounters;
  assert.deepEqual([map, unmap, framesMapped, framesUnmapped, underflow], [2, 2, 3, 3, 0]);
});

test("a scatter list is one request, with neighbours merged", () => {
  const g = guest();
  const list = [3, 4, 9].map((gfn) => ({ gpa: gpa(gfn), length: 4096 }));
  const segments = g.dma.mapSg(list, "bidirectional");
  assert.deepEqual([g.driverCounters.pinRequests, g.driverCounters.pinFrames], [1, 3]);
  g.dma.unmapSg(segments, "bidirectional");
  assert.deepEqual(g.driver.survey(), { liveFrames: 0, liveRefs: 0, pinnedFrames: 3 });
});

test("more ranges than one request takes go in several, and a refusal rolls all of them back", () => {
  const g = guest({ quota: 200 });
  const list = Array.from({ length: 300 }, (_, i) => ({ gpa: gpa(2 * i), length: 100 }));
  assert.equal(
    failure(() => g.dma.mapSg(list, "to-device")),
    "refused",
  );
  const { pinRequests, pinRefused, mapFailed, map } = g.driverCounters;
  assert.deepEqual([pinRequests, pinRefused, mapFailed, map], [2, 1, 1, 0]);
  assert.equal(g.driver.survey().liveRefs, 0);
  assert.equal(word(g, 0), P, "what the first request pinned stays so, and is the host's to unpin");
  g.dma.mapSg(list.slice(0, 150), "to-device");
  assert.equal(g.driver.survey().liveRefs, 150);
});

test("a frame outside the table is refused, and nothing stays counted", () => {
  const g = guest();
  const beyond = [gpa(7), gpa(2 ** 30)].map((at) => ({ gpa: at, length: 1 }));
  assert.equal(
    failure(() => g.dma.mapSg(beyond, "to-device")),
    "no-unit",
  );
  assert.deepEqual([g.driver.survey().liveRefs, g.driverCounters.noUnit], [0, 1]);
});

test("coherent memory is mapped as long as it is allocated", () => {
  const g = guest();
  const { gpa: at, iova } = g.dma.allocCoherent(10_000);
  assert.deepEqual(g.held(at / 4096, at / 4096 + 2), [true, true]);
  g.dma.freeCoherent(at, iova, 10_000);
  assert.deepEqual([g.driver.survey().liveRefs, g.driverCounters.alloc, g.driverCounters.free], [0, 1, 1]);
  assert.equal(
    failure(() => g.dma.allocCoherent(600 * 4096)),
    "no-memory",
  );
});

test("an unmap of what is not mapped is counted, and does not borrow from the flags", () => {
  const g = guest();
  const iova = g.dma.mapSingle(gpa(5), 1, "to-device");
  g.dma.unmapSingle(iova, 1, "to-device");
  g.dma.unmapSingle(iova, 1, "to-device");
  assert.deepEqual([word(g, 5), g.driverCounters.underflow], [P + A, 1]);
});

test("without PIN every map that would ask fails; taken up again, what is mapped is pinned and stays so", () => {
  const g = guest();
  const iova = g.dma.mapSingle(gpa(5), 1, "to-device");
  g.driver.deactivate();
  assert.equal(
    failure(() => g.dma.mapSingle(gpa(6), 1, "to-device")),
    "off",
  );
  assert.deepEqual([g.tracker.life, g.held(5)], ["frozen", [true]]);
  g.driver.reactivate(endpoint);
  passes(g, 3);
  assert.deepEqual(
    [word(g, 5) & P, g.held(5)],
    [P, [true]].map((x) => (x === P ? P | 0 : x)),
  );
  g.dma.unmapSingle(iova, 1, "to-device");
  passes(g, 2);
  assert.deepEqual(g.held(5), [false]);
});

test("a second CPU's driver is made from the places alone", () => {
  const g = guest();
  const second = new GuestDriver(g.on, structuredClone(g.driver.places));
  second.dma(NIC as Bdf, g.direct).mapSingle(gpa(20), 4096, "to-device");
  assert.deepEqual([g.held(20), g.driver.survey().liveRefs], [[true], 1]);
});

test("an endpoint that is not assigned is refused", () => {
  const g = guest();
  assert.equal(
    failure(() => g.driver.dma(0x99 as Bdf, g.direct).mapSingle(gpa(5), 1, "to-device")),
    "refused",
  );
  assert.deepEqual(g.held(5), [false]);
});

/** First frame and number, in pairs. */
const harvest = (g: ReturnType<typeof guest>): number[] => [...g.tracker.dirty.harvest().ranges];

test("the host learns which frames devices may have written, and which they only read", () => {
  const g = guest();
  g.tracker.dirty.start();
  const written = g.dma.mapSingle(gpa(5), 4096, "from-device");
  const read = g.dma.mapSingle(gpa(6), 4096, "to-device");
  const { iova } = g.dma.allocCoherent(4096);
  const coherent = iova / 4096;
  assert.deepEqual([word(g, 5), word(g, 6), word(g, coherent)], [P + A + W + 1, P + A + 1, P + A + W + 1]);
  assert.deepEqual(harvest(g).sort(), [5, 1, coherent, 1].sort());
  g.dma.unmapSingle(written, 4096, "from-device");
  g.dma.unmapSingle(read, 4096, "to-device");
  g.dma.freeCoherent(iova as number as Gpa, iova, 4096);
  assert.deepEqual([word(g, 5), word(g, 6)], [P + A + D, P + A]);
  assert.deepEqual(harvest(g).sort(), [5, 1, coherent, 1].sort());
  assert.deepEqual(harvest(g), []);
  passes(g, 2);
  assert.deepEqual([g.held(5, 6), harvest(g)], [[false, false], []]);
});

test("an old driver sets neither D nor W", () => {
  const g = guest({}, { knowsPinDirty: false });
  const iova = g.dma.mapSingle(gpa(5), 4096, "from-device");
  assert.equal(word(g, 5), P + A + 1);
  g.dma.unmapSingle(iova, 4096, "from-device");
  assert.equal(word(g, 5), P + A);
});

test("a table that is taken up again: what is mapped may be written", () => {
  const g = guest();
  g.tracker.dirty.start();
  g.dma.mapSingle(gpa(5), 4096, "from-device");
  g.driver.deactivate();
  g.driver.reactivate(endpoint);
  assert.equal(word(g, 5) & W, W);
  assert.deepEqual(
    [harvest(g), harvest(g)],
    [
      [5, 1],
      [5, 1],
    ],
  );
});
