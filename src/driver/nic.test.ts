import assert from "node:assert/strict";
import test from "node:test";
import { EarlyUnmap } from "../../test/support/dma.ts";
import { flipping } from "../../test/support/flip.ts";
import { type NicRigOptions, nicRig } from "../../test/support/nic.ts";
import { random } from "../../test/support/random.ts";
import type { Gpa } from "../base/units.ts";
import { GENERATOR } from "../device/nic.ts";
import { fillPacket, isPacket } from "../wire/nic.ts";
import type { DmaBuffer } from "./dma-api.ts";
import { RECEIVE_MODES } from "./receive-buffers.ts";

const DRIVER = 5;

/** Let driver and generator run until `count` packets are there; the numbers of those that are wrong. */
function receive(
  options: NicRigOptions,
  count: number,
  prepare: (r: ReturnType<typeof nicRig>) => void = () => {},
) {
  const r = nicRig(options);
  prepare(r);
  for (let turn = 0; r.received.length < count && turn < 20 * count; turn++) {
    r.receiver.poll(5);
    r.nic.run(3);
  }
  assert.ok(r.received.length >= count, `${r.received.length} of ${count} packets`);
  const packets = r.received.splice(0, count);
  const wrong = packets.flatMap((p, i) => (p && isPacket(p, i, GENERATOR) ? [] : [i]));
  return { ...r, wrong };
}

/** Send packets of `length` in random pieces and receive them; the numbers of those that are wrong. */
function loop(options: Omit<NicRigOptions, "source">, count: number, length: number, failEvery?: number) {
  const r = nicRig({ ...options, source: "loopback" });
  if (failEvery) r.dma.failEvery = failEvery;
  const next = random(length);
  const outcomes: boolean[] = [];
  for (let sequence = 0; sequence < count; sequence++) {
    const packet = new Uint8Array(length);
    fillPacket(packet, sequence, DRIVER);
    // A head of 64 bytes that shares its frame with others, and up to three fragments.
    const place = 0x80_0000 + sequence * 0x1_0000;
    const cut = 64 + next(length - 64);
    const cuts = [0, 64, cut, Math.min(length, cut + 900), length];
    const buffers: DmaBuffer[] = [];
    for (const [i, from] of cuts.slice(0, -1).entries()) {
      const size = cuts[i + 1]! - from;
      const gpa = i === 0 ? 0x70_0000 + 64 * sequence : place + 0x4000 * (i - 1) + next(2048);
      if (size > 0) buffers.push({ gpa: gpa as Gpa, length: size });
      r.memory.write(gpa, packet.subarray(from, from + size));
    }
    r.transmitter.send({ buffers, done: (sent) => outcomes.push(sent) });
  }
  for (let turn = 0; turn < 20 * count && (r.transmitter.pending > 0 || r.received.length < count); turn++) {
    r.receiver.poll(5);
    r.transmitter.poll();
    r.nic.run(3);
  }
  assert.equal(r.transmitter.pending, 0);
  const wrong = r.received.flatMap((p, i) => (p && isPacket(p, i, DRIVER) ? [] : [i]));
  return { ...r, wrong, outcomes };
}

for (const mode of RECEIVE_MODES)
  for (const length of [60, 1500, 9000])
    test(`${mode}: packets of ${length} bytes arrive whole and in order, over many rounds of the ring`, () => {
      const r = receive({ mode, source: { length } }, 100);
      assert.deepEqual([r.wrong, r.counters.faults, r.counters.errors], [[], 0, 0]);
      r.close();
      r.frames.close();
      assert.deepEqual([r.dma.live, r.pages.used], [0, 0]);
    });

test("recycled buffers are mapped once; fresh ones for each packet; halves twice per frame", () => {
  const bytes = (mode: NicRigOptions["mode"]) => {
    const r = receive({ mode, source: { length: 1500 } }, 200);
    return { mapped: r.dma.mapped["from-device"], syncs: r.dma.syncs, countMax: r.dma.countMax };
  };
  const recycled = bytes("recycled");
  assert.ok(recycled.mapped <= 16 * 4096 && recycled.syncs >= 400);
  const fresh = bytes("fresh");
  assert.ok(fresh.mapped >= 200 * 4096 && fresh.countMax === 1 && fresh.syncs === 0);
  const half = bytes("half");
  assert.ok(half.mapped >= 200 * 2048 && half.countMax === 2 && half.syncs === 0);
});

for (const mode of RECEIVE_MODES)
  for (const length of [80, 1500, 9000])
    test(`${mode}: what is sent in pieces comes back, ${length} bytes`, () => {
      const r = loop({ mode }, 60, length);
      assert.deepEqual([r.wrong, r.outcomes], [[], new Array(60).fill(true)]);
      assert.deepEqual([r.received.length, r.counters.faults, r.counters.errors], [60, 0, 0]);
      assert.equal(r.counters.bytes, 2 * 60 * length);
      if (length === 80) assert.ok(r.dma.countMax >= 2, "heads share a frame");
      r.close();
      r.frames.close();
      assert.deepEqual([r.dma.live, r.pages.used], [0, 0]);
    });

for (const mode of RECEIVE_MODES)
  for (const n of [2, 3])
    test(`${mode}: one mapping of ${n} fails: nothing is lost`, () => {
      const prepare = (r: ReturnType<typeof nicRig>) => {
        r.dma.failEvery = n;
      };
      const r = receive({ mode, source: { length: 1500 } }, 100, prepare);
      assert.deepEqual([r.wrong, r.counters.faults], [[], 0]);
      r.close();
      assert.equal(r.dma.live, 0);
      if (n === 2) return; // a packet of two or more pieces would never be mapped whole
      const l = loop({ mode }, 40, 1500, 7);
      assert.deepEqual([l.wrong, l.received.length, l.counters.faults], [[], 40, 0]);
      assert.ok(l.transmitter.mapFailures > 0);
      l.close();
      assert.equal(l.dma.live, 0);
    });

test("stopped with everything under way: all is unmapped, and packets not sent are said to be", () => {
  const r = nicRig({ mode: "fresh", source: "loopback" });
  r.receiver.poll(1);
  const outcomes: boolean[] = [];
  for (let i = 0; i < 20; i++)
    r.transmitter.send({
      buffers: [{ gpa: (0x80_0000 + i * 64) as Gpa, length: 64 }],
      done: (sent) => outcomes.push(sent),
    });
  r.nic.run(2);
  r.close();
  r.frames.close();
  assert.deepEqual(outcomes, new Array(20).fill(false));
  assert.deepEqual([r.dma.live, r.pages.used], [0, 0]);
});

for (const mode of ["fresh", "half"] as const)
  test(`broken twin, ${mode}: a driver that unmaps too early gets DMA faults, and loses the packets`, () => {
    const r = receive({ mode, source: { length: 1500 }, Dma: EarlyUnmap }, 5);
    assert.equal(r.wrong.length, 5);
    assert.ok(r.counters.faults >= 5);
    assert.deepEqual([r.counters.transfers, r.counters.bytes], [0, 0]);
  });

test("broken twin: a driver that unmaps too early has not sent", () => {
  const r = loop({ mode: "recycled", Dma: EarlyUnmap }, 5, 200);
  assert.deepEqual(r.outcomes, new Array(5).fill(false));
});

test("broken twin: a controller with one wrong byte is noticed", () => {
  assert.deepEqual(
    receive({ mode: "half", source: { length: 1500 }, access: flipping(17) }, 35).wrong,
    [16, 33],
  );
  assert.deepEqual(loop({ mode: "fresh", access: flipping(9) }, 20, 1500).wrong, [8, 17]);
});
