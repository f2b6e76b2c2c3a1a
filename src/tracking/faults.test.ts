import assert from "node:assert/strict";
import test from "node:test";
import { FakeClock } from "../../test/support/clock.ts";
import type { Gfn } from "../base/units.ts";
import { counters, countersBuffer } from "../memory/counters.ts";
import { SharedWords } from "../memory/shared-words.ts";
import { TRACKING_COUNTERS } from "./counters.ts";
import { FAULT_WORDS, type Fault, FaultLog, putFault } from "./faults.ts";
import { createIommuBuffer, DEVICES_MAX, DeviceGate, IS_BLOCKED, SoftwareIommu } from "./software-iommu.ts";

const DOMAIN = 1;
const MAPPING = 2;

function rig() {
  const buffer = createIommuBuffer(4096);
  const iommu = new SoftwareIommu(buffer, new FakeClock());
  const count = counters(TRACKING_COUNTERS, countersBuffer(TRACKING_COUNTERS));
  const log = iommu.faultLog(count);
  let rings = 0;
  const gates = Array.from({ length: DEVICES_MAX }, (_, d) => new DeviceGate(buffer, d, () => rings++));
  /** Touch an address that leads nowhere, as GatedMemory does. */
  const touch = (device: number, address: number, access: "read" | "write" = "read") => {
    assert.equal(gates[device]!.translate(Math.floor(address / 4096), access), -1);
    gates[device]!.fault(address, access);
  };
  const taken = (told = true) => {
    const faults: Fault[] = [];
    log.serve((fault) => {
      faults.push(fault);
      return told;
    });
    return faults;
  };
  return { buffer, iommu, log, count, gates, touch, taken, rings: () => rings };
}

test("a fault has its device, address, access, and the reason in the context that refused", () => {
  const { iommu, touch, taken, gates, rings } = rig();
  const root = iommu.tables.create()!;
  iommu.setContext(1, IS_BLOCKED);
  iommu.setContext(2, { root });
  iommu.allow(5 as Gfn);
  assert.ok(iommu.tables.map(root, { first: 7, last: 7, gfn: 5 as Gfn, flags: 1 }));
  touch(0, 0x7123, "write");
  touch(1, 0x5000);
  touch(2, 2 ** 52 - 1);
  touch(2, 0x7000, "write");
  assert.deepEqual(taken(), [
    { device: 0, address: 0x7123, access: "write", reason: 0 },
    { device: 1, address: 0x5000, access: "read", reason: DOMAIN },
    { device: 2, address: 2 ** 52 - 1, access: "read", reason: MAPPING },
    { device: 2, address: 0x7000, access: "write", reason: MAPPING },
  ]);
  assert.deepEqual([taken(), rings(), gates[2]!.translate(7, "read")], [[], 4, 5]);
});

test("a reason is that of the refusal, whatever the device is attached to by the time it tells", () => {
  const { iommu, gates, taken } = rig();
  iommu.setContext(0, IS_BLOCKED);
  assert.equal(gates[0]!.translate(5, "read"), -1);
  iommu.setContext(0, { root: iommu.tables.create()! });
  gates[0]!.fault(0x5000, "read");
  assert.equal(taken()[0]!.reason, DOMAIN);
});

test("addresses of all 64 bits are told, those above as high as they go", () => {
  const { touch, taken } = rig();
  for (const address of [0, 2 ** 32 - 1, 2 ** 32, 2 ** 53 - 1, 2 ** 63, 2 ** 64]) touch(0, address);
  assert.deepEqual(
    taken().map((f) => f.address),
    [0, 2 ** 32 - 1, 2 ** 32, 2 ** 53 - 1, 2 ** 63, 0xffff_ffff * 2 ** 32],
  );
});

test("a ring holds 16 faults of a device; more are lost, counted once, and hide no others", () => {
  const { touch, taken, count } = rig();
  for (let i = 0; i < 20; i++) touch(3, i);
  touch(DEVICES_MAX - 1, 99);
  assert.deepEqual(
    taken().map((f) => f.address),
    [...Array.from({ length: 16 }, (_, i) => i), 99],
  );
  assert.deepEqual([count.faultsReported, count.faultsDropped], [17, 4]);
  touch(3, 50);
  assert.deepEqual([taken(false).length, count.faultsReported, count.faultsDropped], [1, 17, 5]);
});

test("a device that is opened again, and a backend that starts in place of one, go on where the last ended", () => {
  const { buffer, iommu, touch, taken, count } = rig();
  for (let i = 0; i < 10; i++) touch(0, i);
  taken();
  for (let i = 0; i < 8; i++) new DeviceGate(buffer, 0, () => {}).fault(100 + i, "read");
  const seen: number[] = [];
  iommu.faultLog(count).serve(({ address }) => seen.push(address) > 0);
  assert.deepEqual(seen, [100, 101, 102, 103, 104, 105, 106, 107]);
});

test("indices wrap at 32 bits", () => {
  const { buffer, touch, taken } = rig();
  const words = new Int32Array(buffer);
  touch(0, 1);
  const head = words.indexOf(1, 16);
  const tail = head + 16;
  words[head] = words[tail] = 0x7fff_fffe;
  for (let round = 0; round < 3; round++) {
    for (let i = 0; i < 16; i++) touch(0, i);
    assert.equal(taken().length, 16);
  }
  assert.equal(words[head], (0x7fff_fffe + 48) | 0);
});

test("a report that throws leaves the later faults, and the one is counted as dropped", () => {
  const { touch, taken, log, count } = rig();
  touch(0, 1);
  touch(0, 2);
  assert.throws(
    () =>
      log.serve(() => {
        throw new RangeError("the ring is broken");
      }),
    RangeError,
  );
  assert.deepEqual([taken().map((f) => f.address), count.faultsDropped], [[2], 1]);
});

// --- device and backend at once ---------------------------------------------------------------------------------------

/** Words as one thread sees them: `before` runs what the other one does in between. */
class WatchedWords extends SharedWords {
  before: () => void = () => {};
  override load(index: number): number {
    this.before();
    return super.load(index);
  }
  override store(index: number, value: number): void {
    this.before();
    super.store(index, value);
  }
  override add(index: number, value: number): number {
    this.before();
    return super.add(index, value);
  }
  override and(index: number, bits: number): number {
    this.before();
    return super.and(index, bits);
  }
}

/** Broken twin: the record is written behind the head that tells of it. */
class LateRecords extends WatchedWords {
  #late: [index: number, value: number][] = [];
  override store(index: number, value: number): void {
    if (index >= 32) this.#late.push([index, value]);
    else {
      super.store(index, value);
      for (const [at, late] of this.#late.splice(0)) super.store(at, late);
    }
  }
}

/** Ring of `before` faults; one more is put, and the ring served, each once inside the other at step `at`. */
function meet(Words: typeof WatchedWords, before: number, at: number, inner: "put" | "serve"): string {
  const buffer = new SharedArrayBuffer(4 * FAULT_WORDS);
  const device = new Words(buffer);
  const backend = new WatchedWords(buffer);
  const count = counters(TRACKING_COUNTERS, countersBuffer(TRACKING_COUNTERS));
  const log = new FaultLog(backend, [0], count);
  const seen: string[] = [];
  const put = (n: number) => putFault(device, 0, { address: n * (2 ** 32 + 1), access: "write", reason: 2 });
  const serve = () =>
    log.serve(
      ({ address, access, reason }) => seen.push(`${address / (2 ** 32 + 1)} ${access} ${reason}`) > 0,
    );
  for (let n = 1; n <= before; n++) put(n);
  let step = 0;
  const outer = inner === "put" ? backend : device;
  outer.before = () => {
    if (step++ !== at) return;
    outer.before = () => {};
    if (inner === "put") put(before + 1);
    else serve();
  };
  if (inner === "put") serve();
  else put(before + 1);
  if (step <= at) return "no such step";
  outer.before = () => {};
  serve();
  const expected = Array.from({ length: before + 1 }, (_, i) => `${i + 1} write 2`);
  const lost = count.faultsDropped;
  return seen.join() === expected.slice(0, before + 1 - lost).join() && lost <= (before === 16 ? 1 : 0)
    ? "sound"
    : `${seen} of ${before + 1}, ${lost} lost`;
}

function meetings(Words: typeof WatchedWords): string[] {
  const outcomes: string[] = [];
  for (const before of [0, 1, 15, 16])
    for (const inner of ["put", "serve"] as const)
      for (let at = 0; ; at++) {
        const outcome = meet(Words, before, at, inner);
        if (outcome === "no such step") break;
        outcomes.push(outcome);
      }
  return outcomes;
}

test("a fault that is put at any moment of a look at the ring is told whole and once, or counted as lost", () => {
  const outcomes = meetings(WatchedWords);
  assert.ok(outcomes.length > 100);
  assert.deepEqual([...new Set(outcomes)], ["sound"]);
});

test("broken twin: a head that is stored before its record is caught", () =>
  assert.ok(meetings(LateRecords).some((outcome) => outcome !== "sound")));
