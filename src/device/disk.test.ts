import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import test from "node:test";
import { HostError } from "../base/errors.ts";
import type { Gfn, Gpa } from "../base/units.ts";
import { type DmaGate, NO_FRAME } from "../memory/gated-memory.ts";
import * as wire from "../wire/vhost-user.ts";
import {
  VIRTIO_BLK_T_FLUSH,
  VIRTIO_BLK_T_GET_ID,
  VIRTIO_BLK_T_IN,
  VIRTIO_BLK_T_OUT,
  VirtioBlkReqHead,
} from "../wire/virtio-blk.ts";
import { WINDOW_SIZE_MAX } from "./block.ts";
import { MemoryStore } from "./block-store.ts";
import { serveDisk } from "./disk.ts";
import { FrontEnd } from "./front-end.ts";

const HEAD = 0x8000;
const STATUS = 0x9000;
const DATA = 0xa000;
const at = (gpa: number, length: number) => ({ gpa: gpa as Gpa, length });

/** An IOMMU that maps everything but the frames at `forbidden`, and checks that windows are not nested. */
class Gate implements DmaGate {
  readonly forbidden = new Set<number>();
  depth = 0;
  /** Pages that were reached in the largest window. */
  pagesMax = 0;
  readonly #pages = new Set<number>();
  enter() {
    assert.equal(this.depth++, 0);
    this.#pages.clear();
  }
  leave() {
    assert.equal(--this.depth, 0);
  }
  translate(page: number) {
    this.pagesMax = Math.max(this.pagesMax, this.#pages.add(page).size);
    return this.forbidden.has(page * 4096) ? NO_FRAME : (page as Gfn);
  }
  request() {
    return false;
  }
  fault() {}
}

function setUp() {
  const frontEnd = new FrontEnd();
  const counters = { transfers: 0, bytes: 0, faults: 0, errors: 0, requests: 0 };
  const gate = new Gate();
  const store = new MemoryStore(2048);
  const disk = serveDisk({ ports: frontEnd.ports, store, gate, counters, onClose: (e) => assert.fail(e) });
  frontEnd.negotiate();
  const ring = frontEnd.startRing();
  const head = (type: number, sector = 0) =>
    frontEnd.memory.write(HEAD, VirtioBlkReqHead.encode({ type, sector }));
  /** One request as Linux lays it out; the status the guest sees, and the used length. */
  const request = (type: number, sector: number, data: { gpa: Gpa; length: number }[] = []) => {
    head(type, sector);
    frontEnd.ram[STATUS] = 0xee;
    const out = type === VIRTIO_BLK_T_OUT;
    const id = ring.queue.add([at(HEAD, 16), ...(out ? data : [])], [...(out ? [] : data), at(STATUS, 1)]);
    ring.kick();
    const used = ring.queue.poll();
    if (used) assert.equal(used.head, id);
    return { status: frontEnd.ram[STATUS], written: used?.written };
  };
  return { frontEnd, counters, gate, store, disk, ring, head, request };
}

test("what is written is read back, over several buffers", () => {
  const { frontEnd, request, counters } = setUp();
  const data = randomBytes(8192);
  frontEnd.ram.set(data, DATA);
  assert.deepEqual(request(VIRTIO_BLK_T_OUT, 5, [at(DATA, 8192)]), { status: 0, written: 1 });
  const parts = [at(0x20000, 100), at(0x30000, 4000), at(0x20064, 4092)];
  assert.deepEqual(request(VIRTIO_BLK_T_IN, 5, parts), { status: 0, written: 8193 });
  const back = parts.map(({ gpa, length }) => frontEnd.ram.subarray(gpa, gpa + length));
  assert.deepEqual(Buffer.concat(back), data);
  assert.deepEqual(counters, { transfers: 4, bytes: 16384, faults: 0, errors: 0, requests: 2 });
});

test("sectors never written are zero; flush and the serial number are served", () => {
  const { frontEnd, request } = setUp();
  frontEnd.ram.fill(0xff, DATA, DATA + 512);
  assert.deepEqual(request(VIRTIO_BLK_T_IN, 2047, [at(DATA, 512)]), { status: 0, written: 513 });
  assert.ok(frontEnd.ram.subarray(DATA, DATA + 512).every((byte) => byte === 0));
  assert.deepEqual(request(VIRTIO_BLK_T_FLUSH, 0), { status: 0, written: 1 });
  assert.deepEqual(request(VIRTIO_BLK_T_GET_ID, 0, [at(DATA, 20)]), { status: 0, written: 21 });
  assert.equal(Buffer.from(frontEnd.ram.subarray(DATA, DATA + 20)).toString(), "coiommu".padEnd(20, "\0"));
  assert.deepEqual(request(VIRTIO_BLK_T_GET_ID, 0, [at(DATA, 64)]), { status: 0, written: 20 });
});

test("requests outside the disk, of half sectors or of unknown type", () => {
  const { request, counters } = setUp();
  for (const [name, type, sector, length, status] of [
    ["read beyond the end", VIRTIO_BLK_T_IN, 2048, 512, 1],
    ["write across the end", VIRTIO_BLK_T_OUT, 2047, 1024, 1],
    ["sector 2^55", VIRTIO_BLK_T_IN, 2 ** 55, 512, 1],
    ["half a sector", VIRTIO_BLK_T_OUT, 0, 256, 1],
    ["discard", 11, 0, 512, 2],
    ["unknown type", 0xffffffff, 0, 512, 2],
  ] as const)
    assert.equal(request(type, sector, [at(DATA, length)]).status, status, name);
  assert.equal(counters.requests, 6);
  assert.equal(counters.errors, 4);
  assert.equal(counters.transfers, 0);
});

test("hostile chains are given back, and the next request is served", () => {
  const { frontEnd, ring, request, head } = setUp();
  const hostile: [string, () => void, number | undefined][] = [
    ["no writable buffer", () => ring.queue.add([at(HEAD, 16)], []), undefined],
    ["a head of 15 bytes", () => ring.queue.add([at(HEAD, 15)], [at(STATUS, 1)]), 1],
    ["no head at all", () => ring.queue.add([], [at(STATUS, 1)]), 1],
    ["a head outside RAM", () => ring.queue.add([at(2 ** 40, 16)], [at(STATUS, 1)]), 1],
    ["data outside RAM", () => ring.queue.add([at(HEAD, 16)], [at(2 ** 30, 512), at(STATUS, 1)]), 1],
    [
      "data across the end of RAM",
      () => ring.queue.add([at(HEAD, 16)], [at(2 ** 20 - 256, 512), at(STATUS, 1)]),
      1,
    ],
    ["data of 4 GiB", () => ring.queue.add([at(HEAD, 16)], [at(DATA, 2 ** 32 - 512), at(STATUS, 1)]), 1],
    ["a status outside RAM", () => ring.queue.add([at(HEAD, 16)], [at(2 ** 50, 1)]), undefined],
    [
      "an indirect table outside RAM",
      () => {
        ring.queue.describe(0, { addr: 2 ** 50, len: 32, flags: 4 });
        ring.queue.offer(0);
      },
      undefined,
    ],
    [
      "a cycle",
      () => {
        ring.queue.describe(0, { addr: HEAD, len: 16, flags: 1, next: 0 });
        ring.queue.offer(0);
      },
      undefined,
    ],
  ];
  for (const [name, offer, status] of hostile) {
    head(VIRTIO_BLK_T_IN);
    frontEnd.ram[STATUS] = 0xee;
    offer();
    ring.kick();
    assert.ok(ring.queue.poll(), name);
    assert.equal(frontEnd.ram[STATUS], status ?? 0xee, name);
  }
  assert.equal(request(VIRTIO_BLK_T_IN, 0, [at(DATA, 512)]).status, 0);
});

test("a broken ring stops being served, and says so on the err fd, until it is set up anew", () => {
  const { frontEnd, ring, request, counters } = setUp();
  const err = frontEnd.newFd();
  frontEnd.acknowledged(wire.VHOST_USER_SET_VRING_ERR, new Uint8Array(8), [err]);
  ring.queue.offer(16);
  ring.kick();
  assert.equal(counters.errors, 1);
  assert.equal(frontEnd.signals.get(err), 1);
  assert.equal(request(VIRTIO_BLK_T_FLUSH, 0).status, 0xee);
  frontEnd.send(wire.VHOST_USER_GET_VRING_BASE, new Uint8Array(8));
  frontEnd.ram.fill(0, 0x1000, 0x2000);
  const fresh = frontEnd.startRing();
  frontEnd.memory.write(HEAD, VirtioBlkReqHead.encode({ type: VIRTIO_BLK_T_FLUSH }));
  fresh.queue.add([at(HEAD, 16)], [at(STATUS, 1)]);
  fresh.kick();
  assert.equal(frontEnd.ram[STATUS], 0);
});

test("a frame that is not pinned: IOERR to the guest, one fault, and the frame is untouched", () => {
  const { frontEnd, gate, request, counters } = setUp();
  request(VIRTIO_BLK_T_OUT, 0, [at(DATA, 4096)]);
  for (const [forbidden, type] of [
    [DATA, VIRTIO_BLK_T_IN],
    [DATA, VIRTIO_BLK_T_OUT],
    [HEAD, VIRTIO_BLK_T_IN],
    [DATA + 4096, VIRTIO_BLK_T_IN],
  ] as const) {
    const before = counters.faults;
    gate.forbidden.add(forbidden);
    frontEnd.ram.fill(0xdd, DATA, DATA + 8192);
    assert.deepEqual(request(type, 0, [at(DATA, 8192)]).status, 1);
    assert.equal(counters.faults, before + 1);
    assert.ok(frontEnd.ram.subarray(DATA, DATA + 8192).every((byte) => byte === 0xdd));
    gate.forbidden.clear();
  }
  assert.equal(counters.errors, 0);
});

test("however a large request is divided into buffers, no DMA window is larger than its bound", () => {
  const { frontEnd, gate, request, counters } = setUp();
  const length = 2.5 * WINDOW_SIZE_MAX;
  const place = DATA + 512; // so that pieces end inside of pages
  const one = [at(place, length)];
  const neighbours = Array.from({ length: 10 }, (_, i) => at(place + (i * length) / 10, length / 10));
  for (const buffers of [one, neighbours]) {
    const data = randomBytes(length);
    frontEnd.ram.set(data, place);
    assert.equal(request(VIRTIO_BLK_T_OUT, 3, buffers).status, 0);
    frontEnd.ram.fill(0, place, place + length);
    assert.deepEqual(request(VIRTIO_BLK_T_IN, 3, buffers), { status: 0, written: length + 1 });
    assert.ok(data.equals(frontEnd.ram.subarray(place, place + length)));
  }
  assert.equal(gate.pagesMax, WINDOW_SIZE_MAX / 4096 + 1);
  assert.deepEqual([counters.transfers, counters.bytes], [4, 4 * length]);

  // A window that is refused ends the request.
  gate.forbidden.add(DATA + 1.5 * WINDOW_SIZE_MAX);
  assert.equal(request(VIRTIO_BLK_T_IN, 3, neighbours).status, 1);
  assert.deepEqual([counters.faults, counters.transfers], [1, 4]);
});

test("a status or ring frame that is not pinned: counted, kept, and served at a later kick", () => {
  const { frontEnd, gate, ring, request, counters } = setUp();
  for (const forbidden of [STATUS, 0x1000]) {
    const { faults, requests } = counters;
    gate.forbidden.add(forbidden);
    assert.equal(request(VIRTIO_BLK_T_FLUSH, 0).written, undefined);
    assert.ok(counters.faults > faults);
    gate.forbidden.clear();
    ring.kick();
    assert.equal(frontEnd.ram[STATUS], 0);
    assert.equal(ring.queue.poll()?.written, 1);
    assert.equal(counters.requests, requests + 1);
  }
});

test("a request that could not be given back is where the ring resumes after a stop", () => {
  const { frontEnd, gate, request } = setUp();
  request(VIRTIO_BLK_T_FLUSH, 0);
  gate.forbidden.add(STATUS);
  request(VIRTIO_BLK_T_FLUSH, 0);
  const base = frontEnd.send(wire.VHOST_USER_GET_VRING_BASE, new Uint8Array(8))!;
  assert.equal(wire.VringState.read(base).num, 1);
});

test("one interrupt for a batch, none where the driver wants none", () => {
  const { frontEnd, ring, head } = setUp();
  head(VIRTIO_BLK_T_FLUSH);
  for (let i = 0; i < 5; i++) ring.queue.add([at(HEAD, 16)], [at(STATUS, 1)]);
  ring.kick();
  assert.equal(frontEnd.signals.get(ring.callFd), 1);
  ring.kick();
  assert.equal(frontEnd.signals.get(ring.callFd), 1);
  frontEnd.memory.store16(ring.layout.driver, 1);
  ring.queue.add([at(HEAD, 16)], [at(STATUS, 1)]);
  ring.kick();
  assert.equal(frontEnd.signals.get(ring.callFd), 1);
});

test("an error of the host is IOERR to the guest, counted by its errno", () => {
  const { store, request, disk, counters } = setUp();
  store.write = () => {
    throw new HostError("write", "ENOSPC");
  };
  assert.equal(request(VIRTIO_BLK_T_OUT, 0, [at(DATA, 512)]).status, 1);
  assert.equal(request(VIRTIO_BLK_T_OUT, 0, [at(DATA, 512)]).status, 1);
  assert.deepEqual([...disk.device.hostErrors], [["ENOSPC", 2]]);
  assert.equal(counters.errors, 2);
  assert.equal(counters.bytes, 0);
});
