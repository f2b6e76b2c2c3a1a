/** Fault reports as the driver sees them: VIRTIO 1.2 section 5.13.6.9. */
import assert from "node:assert/strict";
import test from "node:test";
import { ramRegion } from "../../test/support/guest.ts";
import { machine } from "../../test/support/machine.ts";
import { DISK } from "../../test/support/viommu.ts";
import { DmaFault } from "../base/errors.ts";
import type { Bdf, Gfn, Gpa } from "../base/units.ts";
import { counters, countersBuffer } from "../memory/counters.ts";
import { GatedMemory } from "../memory/gated-memory.ts";
import { GuestMemory } from "../memory/guest-memory.ts";
import { EVENT_QUEUE, VirtioIommu } from "../virtio/iommu.ts";
import { VirtioPciFunction } from "../virtio/pci.ts";
import { SplitQueue } from "../virtio/queue.ts";
import { Fault } from "../wire/virtio-iommu.ts";
import { RingHead } from "../wire/virtqueue.ts";
import { DRIVER_COUNTERS } from "./counters.ts";
import { eventQueueAt, FaultEvents, type FaultReport } from "./fault-events.ts";
import { FramePool } from "./pages.ts";
import { GuestDriver } from "./viommu.ts";

const PAGE = 0x3000 as Gpa;

/** The driver's side, and a device that does what a test says. */
function queue(size = 8) {
  const memory = new GuestMemory([ramRegion(0, 16)]);
  const layout = eventQueueAt(PAGE, size);
  const count = counters(DRIVER_COUNTERS, countersBuffer(DRIVER_COUNTERS));
  const seen: FaultReport[] = [];
  let notified = 0;
  const events = new FaultEvents({
    ...{ memory, counters: count, queue: layout, faulted: (report: FaultReport) => seen.push(report) },
    notify: () => notified++,
  });
  events.setUp();
  const device = new SplitQueue(memory, layout);
  return {
    ...{ memory, layout, events, device, seen, count },
    notified: () => notified,
    /** The device fills its next buffer; false when it has none. */
    report(event: Uint8Array, written = event.length): boolean {
      const chain = device.pop();
      if (!chain) return false;
      assert.deepEqual([chain.readable, chain.writable[0]!.length], [[], Fault.size]);
      memory.write(chain.writable[0]!.gpa, event);
      device.push(chain.head, written);
      return true;
    },
  };
}
const FAULT = { reason: 2, flags: 0x102, endpoint: 0x20, address: 0x1234_5678 };
const REPORT = { endpoint: 0x20, reason: 2, reads: false, writes: true, address: 0x1234_5678 };

test("each report is told once, in order, and its buffer is the device's again", () => {
  const q = queue();
  for (let address = 0; address < 100; address++) {
    assert.ok(q.report(Fault.encode({ ...FAULT, address })));
    if (address % 7 === 0) q.events.poll();
  }
  q.events.poll();
  q.events.poll();
  assert.deepEqual(
    q.seen.map((r) => r.address),
    Array.from({ length: 100 }, (_, i) => i),
  );
  assert.deepEqual([q.count.faults, q.count.badEvents, q.notified()], [100, 0, 16]);
});

test("the rings' indices go past 2^16", () => {
  const q = queue();
  for (let n = 0; n < 70_000; n++) {
    assert.ok(q.report(Fault.encode({ ...FAULT, address: n })));
    if (n % 8 === 7) q.events.poll();
  }
  assert.deepEqual([q.count.faults, q.seen.at(-1)?.address], [70_000, 69_999]);
});

for (const size of [1, 2, 64, 32_768])
  test(`a device that offers ${size} descriptors has a buffer in each that is used, all in one page`, () => {
    const q = queue(size);
    let given = 0;
    while (q.report(Fault.encode(FAULT))) given++;
    assert.equal(given, Math.min(size, 64));
    q.events.poll();
    assert.deepEqual(q.seen, new Array(given).fill(REPORT));
    const beyond = new Uint8Array(0x1000);
    q.memory.read(PAGE + 0x1000, beyond);
    assert.ok(beyond.every((byte) => byte === 0));
  });

const MEANINGS: [what: string, fields: Parameters<typeof Fault.encode>[0], expected: object][] = [
  ["a read", { flags: 0x101 }, { reads: true, writes: false }],
  ["both", { flags: 0x103 }, { reads: true, writes: true }],
  ["undefined flags", { flags: 0xffff_fefe }, { reads: false, writes: true, address: undefined }],
  ["no address", { flags: 2 }, { address: undefined }],
  ["an unknown reason", { reason: 77 }, { reason: 0 }],
  ["reserved1, which is ignored", { reserved2: 5 }, {}],
  ["an endpoint that does not exist", { endpoint: 0xffff_ffff }, { endpoint: 0xffff_ffff }],
];
for (const [what, fields, expected] of MEANINGS)
  test(`a report with ${what}`, () => {
    const q = queue();
    q.report(Fault.encode({ ...FAULT, ...fields }));
    q.events.poll();
    assert.deepEqual(q.seen, [{ ...REPORT, ...expected }]);
  });

for (const [what, event, written] of [
  ["a short event", Fault.encode(FAULT), 23],
  ["an empty event", Fault.encode(FAULT), 0],
  ["a reserved field that is not zero", Fault.encode({ ...FAULT, reserved: Uint8Array.of(0, 0, 1) }), 24],
] as const)
  test(`${what} is counted and ignored; what follows is told`, () => {
    const q = queue();
    q.report(event, written);
    q.report(Fault.encode(FAULT));
    q.events.poll();
    assert.deepEqual([q.seen, q.count.faults, q.count.badEvents], [[REPORT], 1, 1]);
  });

test("a device that gives back what is none of its buffers is counted, and the queue goes on", () => {
  const q = queue();
  for (const head of [8, 0xffff_ffff, 2 ** 31]) {
    assert.ok(q.device.pop());
    q.device.push(head, 24);
  }
  q.events.poll();
  assert.deepEqual([q.seen, q.count.badEvents], [[], 3]);
  assert.ok(q.report(Fault.encode(FAULT)));
  q.events.poll();
  assert.deepEqual(q.seen, [REPORT]);
});

test("a device that gives without end is looked at for a round of its queue, and costs nothing else", () => {
  const q = queue();
  for (const idx of [9, 0x8000, 0xffff]) {
    q.memory.store16(q.layout.device + RingHead.fields.idx.at, idx);
    const before = q.count.faults + q.count.badEvents;
    q.events.poll();
    assert.equal(q.count.faults + q.count.badEvents - before, 8);
  }
});

test("a device that says that it wrote more than there is room for is read no further", () => {
  const q = queue();
  q.report(Fault.encode(FAULT), 0xffff_ffff);
  q.events.poll();
  assert.deepEqual(q.seen, [REPORT]);
});

test("what a reset device has left is told, and the device is not notified", () => {
  const q = queue();
  q.report(Fault.encode(FAULT));
  assert.deepEqual([q.events.drain(), q.events.drain()], [true, false]);
  assert.deepEqual([q.seen, q.notified()], [[REPORT], 0]);
});

/** The whole driver over the real device. */
function guest() {
  const m = machine();
  const device = new VirtioIommu({
    ...{ memory: m.memory, tracker: m.tracker, assigned: new Map([[DISK as Bdf, 0]]), pinPage: true },
    hostError: (error) => assert.fail(error),
  });
  const pciFunction = new VirtioPciFunction(device, m.memory);
  const count = counters(DRIVER_COUNTERS, countersBuffer(DRIVER_COUNTERS));
  const seen: FaultReport[] = [];
  const driver = GuestDriver.activate(
    {
      ...{ memory: m.memory, pciFunction, counters: count, cpu: { waitFor: (done) => done() } },
      faulted: (report) => seen.push(report),
    },
    new FramePool(m.memory, 1024 as Gfn, 512),
    1,
  );
  const disk = new GatedMemory(m.memory, m.gate);
  /** A DMA that the IOMMU refuses, and the device's report of it. */
  const fault = (address: number) => {
    assert.throws(() => disk.store16(address, 1), DmaFault);
    pciFunction.withQueue(EVENT_QUEUE, (events) => device.reportFaults(events));
  };
  return { ...m, driver, device, seen, count, fault };
}

test("the driver is told of a fault on the device's event queue, and of 200 one after the other", () => {
  const g = guest();
  g.fault(0x5123);
  g.driver.pollFaults();
  assert.deepEqual(g.seen, [{ endpoint: DISK, reason: 0, reads: false, writes: true, address: 0x5123 }]);
  for (let i = 0; i < 200; i++) {
    g.fault(0x6000);
    if (i % 50 === 0) g.driver.pollFaults();
  }
  g.driver.pollFaults();
  assert.deepEqual([g.seen.length, g.count.faults], [201, 201]);
  assert.deepEqual([g.counters.faultsReported, g.counters.faultsDropped, g.device.badRequests], [201, 0, 0]);
});

test("in a domain the reason is MAPPING", () => {
  const g = guest();
  g.driver.domains.attach(7, DISK as Bdf);
  g.fault(0x9_0000_0000);
  g.driver.pollFaults();
  assert.deepEqual(
    g.seen.map((r) => [r.reason, r.address]),
    [[2, 0x9_0000_0000]],
  );
});

test("no report is lost when the driver starts again, and the device has all its buffers back", () => {
  const g = guest();
  for (let i = 0; i < 40; i++) g.fault(0x5000);
  g.driver.deactivate();
  assert.equal(g.seen.length, 40);
  g.driver.reactivate(DISK as Bdf);
  for (let i = 0; i < 64; i++) g.fault(0x6000);
  g.driver.pollFaults();
  assert.deepEqual([g.seen.length, g.counters.faultsDropped], [104, 0]);
});
