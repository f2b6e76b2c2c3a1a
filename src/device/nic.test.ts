import assert from "node:assert/strict";
import test from "node:test";
import { nicParts } from "../../test/support/nic.ts";
import { random } from "../../test/support/random.ts";
import type { Gfn, Iova } from "../base/units.ts";
import {
  COMMAND_DEXT,
  COMMAND_EOP,
  COMMAND_RS,
  ERROR_RXE,
  fillPacket,
  isPacket,
  ReceiveDescriptor,
  STATUS_DD,
  STATUS_EOP,
  STATUS_TU,
  TransmitDescriptor,
} from "../wire/nic.ts";
import { GENERATOR, type NicSetup } from "./nic.ts";

const SIZE = 8;
const LAST = COMMAND_EOP | COMMAND_RS;

/** A controller, and a driver that writes what it likes. Frames are mapped as the test says. */
function setUp(source: NicSetup["source"] = "loopback") {
  const parts = nicParts({ allocatable: 16 });
  const { memory, dma, nic, counters } = parts;
  const rings = [0x1000, 0x2000].map((gpa) => ({ iova: gpa as Iova, size: SIZE }));
  const [receive, transmit] = rings as [{ iova: Iova; size: number }, { iova: Iova; size: number }];
  const map = (gpa: number, length = 4096) => dma.mapSingle(gpa as never, length, "bidirectional");
  const unmap = (gpa: number, length = 4096) => dma.unmapSingle(gpa as Iova, length, "bidirectional");
  map(receive.iova);
  map(transmit.iova);
  nic.start({ receive, transmit, bufferSize: 2048, source });
  let tail = 0;
  let receiveTail = 0;
  const offer = (...addresses: number[]) => {
    for (const address of addresses) {
      memory.write(receive.iova + 16 * receiveTail, ReceiveDescriptor.encode({ address }));
      receiveTail = (receiveTail + 1) % SIZE;
    }
    nic.receive(receiveTail);
  };
  const send = (fields: Parameters<typeof TransmitDescriptor.encode>[0]) => {
    const at = transmit.iova + 16 * tail;
    memory.write(at, TransmitDescriptor.encode(fields));
    tail = (tail + 1) % SIZE;
    nic.transmit(tail);
    return () => memory.load16(at + 12);
  };
  const received = (slot: number) => {
    const raw = new Uint8Array(16);
    memory.read(receive.iova + 16 * slot, raw);
    return ReceiveDescriptor.read(raw);
  };
  const read = (gpa: number, length: number) => {
    const into = new Uint8Array(length);
    memory.read(gpa, into);
    return into;
  };
  return { ...parts, counters, receive, transmit, map, unmap, offer, send, received, read };
}

const A = 0x10_0000;
const B = 0x20_0000;

test("a packet over two buffers: length and status of each, EOP in the last", () => {
  const { map, offer, received, read, nic } = setUp({ length: 3000 });
  map(A);
  map(B);
  offer(A, B, A + 2048);
  assert.deepEqual(nic.run(8), { completed: 1, more: false });
  assert.deepEqual([received(0).length, received(0).status], [2048, STATUS_DD]);
  assert.deepEqual([received(1).length, received(1).status], [952, STATUS_DD | STATUS_EOP]);
  assert.equal(received(2).status, 0);
  assert.ok(isPacket(Buffer.concat([read(A, 2048), read(B, 952)]), 0, GENERATOR));
});

test("no more than the limit in one run, and the caller learns that there may be more", () => {
  const { map, offer, nic } = setUp({ length: 100 });
  map(A);
  offer(A, A, A, A, A);
  assert.deepEqual(nic.run(3), { completed: 3, more: true });
  assert.deepEqual(nic.run(3), { completed: 2, more: false });
});

test("DMA fault at a buffer: the packet is lost, its last descriptor says so, and the next arrives", () => {
  const { map, offer, received, nic, counters, read } = setUp({ length: 3000 });
  map(B);
  offer(A, B, B, B + 2048);
  nic.run(8);
  assert.deepEqual([received(0).errors, received(1).errors], [0, ERROR_RXE]);
  assert.deepEqual([received(3).errors, received(3).status], [0, STATUS_DD | STATUS_EOP]);
  assert.ok(isPacket(read(B, 3000), 1, GENERATOR));
  assert.deepEqual([counters.faults, counters.errors, counters.requests], [1, 0, 2]);
});

test("DMA fault at a fragment: the packet is not sent, its status says so, and the next is", () => {
  const { map, send, offer, received, nic, memory, counters } = setUp();
  map(A);
  map(B);
  const packet = new Uint8Array(100);
  fillPacket(packet, 4, 5);
  memory.write(A, packet);
  send({ address: 0x50_0000, length: 100 });
  const lost = send({ address: A, length: 50, command: LAST });
  const sent = send({ address: A, length: 100, command: LAST });
  offer(B);
  nic.run(8);
  assert.deepEqual([lost(), sent()], [STATUS_DD | STATUS_TU, STATUS_DD]);
  assert.equal(received(0).length, 100);
  assert.deepEqual([counters.faults, counters.errors], [1, 0]);
});

for (const which of ["receive", "transmit"] as const)
  test(`DMA fault at the ${which} ring: counted, and nothing is lost`, () => {
    const r = setUp();
    r.map(A);
    r.map(B);
    r.unmap(r[which].iova);
    const status = r.send({ address: A, length: 64, command: LAST });
    r.offer(B);
    for (let i = 1; i <= 3; i++) {
      const before = r.counters.faults;
      r.nic.run(8);
      assert.ok(r.counters.faults > before);
      assert.equal(r.received(0).status, 0);
    }
    r.map(r[which].iova);
    r.nic.run(8);
    assert.deepEqual([status(), r.received(0).status], [STATUS_DD, STATUS_DD | STATUS_EOP]);
    assert.equal(r.counters.requests, 2);
  });

test("a ring that is forbidden between data and status: the packet is delivered once", () => {
  const r = setUp({ length: 100 });
  r.map(A);
  r.offer(A);
  // The device's own write of the data is the moment: the frame of the ring goes away.
  const write = r.memory.write.bind(r.memory);
  r.memory.write = (gpa, from) => {
    if (gpa === A) r.unmap(r.receive.iova);
    write(gpa, from);
  };
  r.nic.run(8);
  r.memory.write = write;
  assert.deepEqual([r.counters.faults, r.received(0).status], [1, 0]);
  r.map(r.receive.iova);
  r.nic.run(8);
  assert.deepEqual([r.counters.requests, r.received(0).status], [1, STATUS_DD | STATUS_EOP]);
  assert.ok(isPacket(r.read(A, 100), 0, GENERATOR));
});

test("nothing is dropped when nobody receives: transmission waits", () => {
  const r = setUp();
  r.map(A);
  r.map(B);
  let sent = 0;
  for (let i = 0; i < 100; i++) {
    const status = r.send({ address: A, length: 64, command: LAST });
    r.nic.run(8);
    if (status() === 0) break;
    sent++;
  }
  assert.equal(sent, 64);
  for (let i = 0; i < 80; i++) {
    r.offer(B);
    r.nic.run(8);
  }
  assert.equal(r.counters.requests, 65 + 65);
});

test("after stop there is no DMA", () => {
  const { map, offer, nic, counters } = setUp({ length: 100 });
  map(A);
  offer(A);
  nic.stop();
  assert.deepEqual([nic.stopped, nic.run(8), counters.transfers], [true, { completed: 0, more: false }, 0]);
});

const refusals: readonly [string, Parameters<typeof TransmitDescriptor.encode>[0]][] = [
  ["an extended descriptor", { address: A, length: 64, command: LAST | COMMAND_DEXT }],
  ["a packet longer than any", { address: A, length: 0xffff, command: LAST }],
  ["an address that is no RAM", { address: 2 ** 51, length: 64, command: LAST }],
];
for (const [what, fields] of refusals)
  test(`not sent, and counted: ${what}`, () => {
    const { dma, map, send, nic, counters } = setUp();
    map(A);
    dma.gate.translate = (page) => page as Gfn;
    const status = send(fields);
    nic.run(8);
    assert.deepEqual([status(), counters.errors], [STATUS_DD | STATUS_TU, 1]);
    const good = send({ address: A, length: 64, command: LAST });
    nic.run(8);
    assert.equal(good(), STATUS_DD);
  });

test("descriptors without end, address or length: done, and nothing is sent", () => {
  const { map, send, offer, received, nic, counters } = setUp();
  map(A);
  offer(A);
  for (let i = 0; i < 100; i++) {
    send({ address: A, length: i % 2 ? 0 : 4000 });
    nic.run(8);
  }
  const status = send({ command: LAST });
  nic.run(8);
  assert.equal(status(), STATUS_DD | STATUS_TU);
  assert.deepEqual([received(0).status, counters.errors, counters.transfers], [0, 1, 4]);
});

test("a tail that is out of range is counted and ignored", () => {
  const { nic, counters } = setUp();
  for (const tail of [-1, SIZE, 2 ** 31]) {
    nic.receive(tail);
    nic.transmit(tail);
  }
  assert.equal(counters.errors, 6);
  assert.deepEqual(nic.run(8), { completed: 0, more: false });
});

for (let seed = 1; seed <= 8; seed++)
  test(`hostile rings: every run ends within its limit (seed ${seed})`, () => {
    const next = random(seed);
    const r = setUp(next(2) ? "loopback" : { length: 30 + next(9000) });
    for (const gpa of [A, B]) r.map(gpa);
    for (let i = 0; i < 500; i++) {
      const address = [A, B, 0x1000, 0x2000, next(2 ** 32), next(2 ** 31) * 2 ** 33, 0][next(7)]! + next(64);
      r.memory.write(0x1000 + 16 * next(SIZE), ReceiveDescriptor.encode({ address, length: next(2 ** 16) }));
      const command = next(256);
      const fields = { address, length: next(2 ** 16), command, status: next(256) };
      r.memory.write(0x2000 + 16 * next(SIZE), TransmitDescriptor.encode(fields));
      r.nic.receive(next(SIZE + 1));
      r.nic.transmit(next(SIZE + 1));
      assert.ok(r.nic.run(5).completed <= 10);
      assert.equal(r.nic.stopped, false);
    }
  });
