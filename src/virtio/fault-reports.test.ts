/** Fault reports on the event queue: VIRTIO 1.2 section 5.13.6.9. */
import assert from "node:assert/strict";
import test from "node:test";
import {
  activeViommu,
  buffer,
  DISK,
  NIC,
  NOT_RAM,
  OK,
  REPLY,
  type Viommu,
  viommu,
} from "../../test/support/viommu.ts";
import { DmaFault } from "../base/errors.ts";
import { GatedMemory } from "../memory/gated-memory.ts";
import { Fault, ReqAttach } from "../wire/virtio-iommu.ts";
import { layoutAt } from "./driver-queue.ts";
import { SplitQueue } from "./queue.ts";

const BUFFER = 24;
const attach = (r: Viommu) => r.status(ReqAttach.encode({ type: 1, domain: 7, endpoint: DISK }));

/** A DMA of 2 bytes that the IOMMU refuses. */
function fault(r: Viommu, address: number, access: "read" | "write" = "read", gate = r.gate): void {
  const memory = new GatedMemory(r.memory, gate);
  const dma = () =>
    access === "read" ? memory.read(address, new Uint8Array(2)) : memory.write(address, new Uint8Array(2));
  assert.throws(dma, DmaFault);
}
/** What the device has given back: what each buffer holds, and how much of it is said to be written. */
const events = (r: Viommu) => {
  const all: { written: number; bytes: string }[] = [];
  for (let used = r.events.poll(); used; used = r.events.poll()) {
    const bytes = new Uint8Array(BUFFER);
    r.memory.read(r.eventBuffers.get(used.head)!, bytes);
    all.push({ written: used.written, bytes: Buffer.from(bytes).toString("hex") });
  }
  return all;
};
const report = (value: Parameters<typeof Fault.encode>[0]) => ({
  written: BUFFER,
  bytes: Buffer.from(Fault.encode(value)).toString("hex"),
});
const counts = (r: Viommu) => [r.counters.faultsReported, r.counters.faultsDropped, r.device.badRequests];

test("a fault is reported with reason, flags, endpoint and address; all else is zero", () => {
  const r = activeViommu();
  r.giveEvent();
  r.giveEvent();
  fault(r, 0x5123, "write");
  fault(r, 0x7000, "read", r.otherGate);
  r.reportFaults();
  assert.deepEqual(events(r), [
    { written: 24, bytes: "00000000" + "02010000" + "20000000" + "00000000" + "2351000000000000" },
    { written: 24, bytes: "00000000" + "01010000" + "03010000" + "00000000" + "0070000000000000" },
  ]);
  assert.deepEqual(counts(r), [2, 0, 0]);
});

test("the reason is DOMAIN without a domain, MAPPING in one", () => {
  const r = activeViommu();
  r.set("bypass", 0);
  fault(r, 0x5000);
  assert.equal(attach(r), OK);
  fault(r, 0x6000);
  fault(r, 0xfee0_0000, "write");
  for (let i = 0; i < 3; i++) r.giveEvent();
  r.reportFaults();
  assert.deepEqual(events(r), [
    report({ reason: 1, flags: 0x101, endpoint: DISK, address: 0x5000 }),
    report({ reason: 2, flags: 0x101, endpoint: DISK, address: 0x6000 }),
    report({ reason: 2, flags: 0x102, endpoint: DISK, address: 0xfee0_0000 }),
  ]);
});

test("without a buffer a fault is dropped, counted, and not told later", () => {
  const r = activeViommu();
  fault(r, 0x5000);
  r.reportFaults();
  r.giveEvent();
  r.device.kick(1, r.eventQueue);
  r.reportFaults();
  assert.deepEqual([events(r), counts(r)], [[], [0, 1, 0]]);
  fault(r, 0x6000);
  r.reportFaults();
  assert.deepEqual(counts(r), [1, 1, 0]);
});

test("a driver without an event queue is told of nothing, and a reset forgets what waits", () => {
  const r = activeViommu();
  fault(r, 0x5000);
  r.device.reportFaults(undefined);
  fault(r, 0x6000);
  r.device.reset();
  r.giveEvent();
  r.reportFaults();
  assert.deepEqual([events(r), counts(r)], [[], [0, 2, 0]]);
});

test("faults of what is no endpoint of the guest's are dropped", () => {
  const r = activeViommu();
  r.giveEvent();
  r.functions.delete(DISK);
  fault(r, 0x5000);
  r.reportFaults();
  assert.deepEqual([events(r), counts(r)], [[], [0, 1, 0]]);
  fault(r, 0x5000, "read", r.otherGate);
  r.reportFaults();
  assert.deepEqual(events(r), [report({ reason: 0, flags: 0x101, endpoint: NIC, address: 0x5000 })]);
});

test("a report may be split over the descriptors of one buffer at any boundary", () => {
  for (let at = 1; at < BUFFER; at++) {
    const r = activeViommu();
    r.giveEvent([buffer(REPLY, at), buffer(REPLY + at, 100)]);
    fault(r, 0x5000);
    r.reportFaults();
    assert.deepEqual(events(r), [report({ flags: 0x101, endpoint: DISK, address: 0x5000 })]);
  }
});

const HOSTILE: Record<string, (r: Viommu) => void> = {
  "too small a buffer": (r) => r.giveEvent([buffer(REPLY, 23)]),
  "an empty buffer": (r) => r.giveEvent([buffer(REPLY, 0)]),
  "a readable buffer": (r) => r.giveEvent([], [buffer(REPLY, 24)]),
  "a buffer outside RAM": (r) => r.giveEvent([buffer(NOT_RAM, 24)]),
  "a buffer of which the end is outside RAM": (r) => r.giveEvent([buffer(REPLY, 23), buffer(NOT_RAM, 1)]),
  "a buffer at the top of 64 bits": (r) => r.giveEvent([buffer(2 ** 64 - 2048, 0xffff_ffff)]),
  "a chain that is a cycle": (r) => {
    r.events.describe(9, { addr: REPLY, len: 24, flags: 3, next: 9 });
    r.events.offer(9);
    r.eventBuffers.set(9, REPLY);
  },
};
for (const [what, give] of Object.entries(HOSTILE))
  test(`${what} is given back with length 0 and counted, and the next one has the report`, () => {
    const r = activeViommu();
    give(r);
    r.giveEvent();
    fault(r, 0x5000);
    r.reportFaults();
    const [bad, good] = events(r);
    assert.equal(bad?.written, 0);
    assert.deepEqual(good, report({ flags: 0x101, endpoint: DISK, address: 0x5000 }));
    assert.deepEqual(counts(r), [1, 0, 1]);
  });

test("a queue of bad buffers alone is given back, and the fault is dropped", () => {
  const r = activeViommu();
  for (let i = 0; i < 16; i++) r.giveEvent([buffer(REPLY, 23)]);
  fault(r, 0x5000);
  fault(r, 0x6000);
  r.reportFaults();
  assert.deepEqual([events(r).map((e) => e.written), counts(r)], [new Array(16).fill(0), [0, 2, 16]]);
});

test("a driver that adds bad buffers while it is told ends no loop of the device", () => {
  const r = activeViommu();
  let pops = 0;
  class Refilled extends SplitQueue {
    override pop() {
      pops++;
      r.giveEvent([buffer(REPLY, 23)]);
      return super.pop();
    }
    override push(head: number, written: number) {
      super.push(head, written);
      r.events.poll();
    }
  }
  fault(r, 0x5000);
  r.device.reportFaults(new Refilled(r.memory, layoutAt(0x1_4000, 16)));
  assert.deepEqual([pops, counts(r)], [16, [0, 1, 16]]);
});

test("a broken event ring throws what the transport answers with NEEDS_RESET; the fault is dropped", () => {
  const r = viommu();
  r.events.offer(16);
  fault(r, 0x5000);
  assert.throws(() => r.reportFaults(), { code: "ERR_COIOMMU_PROTOCOL" });
  assert.deepEqual(counts(r), [0, 1, 0]);
});
