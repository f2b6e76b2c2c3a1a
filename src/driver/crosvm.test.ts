import assert from "node:assert/strict";
import test from "node:test";
import { type MachineOptions, machine } from "../../test/support/machine.ts";
import { DISK, NIC } from "../../test/support/viommu.ts";
import type { Bdf, Gfn, Gpa } from "../base/units.ts";
import { counters, countersBuffer } from "../memory/counters.ts";
import { CrosvmFunction } from "../virtio/crosvm-function.ts";
import { DRIVER_COUNTERS } from "./counters.ts";
import { CrosvmDriver } from "./crosvm.ts";
import { DirectDma } from "./dma.ts";
import { DmaMapFailed } from "./dma-api.ts";
import { FramePool } from "./pages.ts";

const endpoint = DISK as Bdf;

/** A guest on one CPU whose driver is that of crosvm's coIOMMU, over the real backend and a fake host. */
function guest(options: MachineOptions = {}) {
  const m = machine(options);
  const device = new CrosvmFunction({
    memory: m.memory,
    tracker: m.tracker,
    assigned: new Map([
      [endpoint, 0],
      [NIC as Bdf, 1],
    ]),
    hostError: (error) => assert.fail(error),
  });
  const count = counters(DRIVER_COUNTERS, countersBuffer(DRIVER_COUNTERS));
  const cpu = { waitFor: (done: () => boolean) => done() };
  const on = { memory: m.memory, pciFunction: device, cpu, counters: count };
  const pages = new FramePool(m.memory, 1024 as Gfn, 512);
  const driver = CrosvmDriver.activate(on, pages, 2);
  const direct = new DirectDma(pages);
  return { ...m, device, on, driver, direct, driverCounters: count, dma: driver.dma(endpoint, direct) };
}
type Guest = ReturnType<typeof guest>;

const gpa = (gfn: number) => (gfn * 4096) as Gpa;
const list = (...gfns: number[]) => gfns.map((gfn) => ({ gpa: gpa(gfn), length: 4096 }));
const twoPasses = (g: Guest) => [g.pass(), g.pass()];
const reason = (action: () => unknown) => {
  try {
    action();
  } catch (error) {
    if (error instanceof DmaMapFailed) return error.reason;
    throw error;
  }
  return undefined;
};

test("the driver reads which functions are assigned, and activates its table", () => {
  const g = guest();
  assert.deepEqual(g.driver.assigned(), [endpoint, NIC]);
  assert.equal(g.tracker.life, "tracked");
});

test("one frame, and a list of frames, are pinned on request and unpinned when idle", () => {
  const g = guest();
  const one = g.dma.mapSingle(gpa(5), 10, "to-device");
  const many = g.dma.mapSg(list(5, 7, 8, 20), "from-device");
  assert.deepEqual(g.held(5, 7, 8, 20, 6), [true, true, true, true, false]);
  assert.equal(g.driverCounters.pinRequests, 2, "what is pinned is not asked for again");
  g.dma.unmapSg(many, "from-device");
  twoPasses(g);
  assert.deepEqual(g.held(5, 7), [true, false]);
  g.dma.unmapSingle(one, 10, "to-device");
  twoPasses(g);
  assert.deepEqual([g.held(5), g.device.peerErrors], [[false], 0]);
});

test("a list longer than a page goes in several requests", () => {
  const g = guest();
  g.dma.mapSg(list(...Array.from({ length: 900 }, (_, i) => i)), "to-device");
  assert.deepEqual([g.driverCounters.pinRequests, g.tracker.pinned], [2, 900]);
});

test("a pin that is refused leaves P clear, and the mapping fails", () => {
  const g = guest({ quota: 3 });
  assert.equal(
    reason(() => g.dma.mapSg(list(1, 2, 3, 4), "to-device")),
    "not-seen",
  );
  assert.deepEqual([g.held(1, 4), g.driverCounters.mapFailed], [[false, false], 1]);
  g.dma.mapSg(list(1, 2, 3), "to-device");
});

test("an endpoint that is not assigned pins nothing", () => {
  const g = guest();
  const other = g.driver.dma(0x99 as Bdf, g.direct);
  assert.equal(
    reason(() => other.mapSingle(gpa(5), 1, "to-device")),
    "not-seen",
  );
  assert.deepEqual([g.held(5), g.device.peerErrors], [[false], 1]);
});

test("every CPU has a slot of its own", () => {
  const g = guest();
  const second = new CrosvmDriver(g.on, 1, structuredClone(g.driver.places));
  second.dma(endpoint, g.direct).mapSg(list(3, 9), "to-device");
  assert.deepEqual(g.held(3, 9), [true, true]);
});

test("after deactivation nothing is unpinned, and nothing is pinned", () => {
  const g = guest();
  const iova = g.dma.mapSingle(gpa(5), 1, "to-device");
  g.driver.deactivate();
  g.dma.unmapSingle(iova, 1, "to-device");
  twoPasses(g);
  assert.deepEqual([g.tracker.life, g.held(5)], ["frozen", [true]]);
  assert.equal(
    reason(() => g.dma.mapSingle(gpa(6), 1, "to-device")),
    "not-seen",
  );
});

test("a device that never frees the slot fails the mapping, and later ones on that CPU", () => {
  const g = guest();
  const deaf = {
    configRead: (offset: number, size: number) => g.device.configRead(offset, size),
    configWrite: () => {},
    barRead: (address: number, size: number) => g.device.barRead(address, size),
    // Slots are written, triggers get lost.
    barWrite: (address: number, size: number, value: bigint) => {
      if (size === 8) g.device.barWrite(address, size, value);
    },
    reset: () => {},
  };
  const driver = new CrosvmDriver({ ...g.on, pciFunction: deaf }, 0, g.driver.places);
  const dma = driver.dma(endpoint, g.direct);
  assert.equal(
    reason(() => dma.mapSingle(gpa(5), 1, "to-device")),
    "lost",
  );
  assert.equal(
    reason(() => dma.mapSingle(gpa(6), 1, "to-device")),
    "off",
  );
  const { pinLost, pinOff, pinRefused } = g.driverCounters;
  assert.deepEqual([pinLost, pinOff, pinRefused], [1, 1, 2]);
});
