import assert from "node:assert/strict";
import test from "node:test";
import type { HostError, PeerError } from "../base/errors.ts";
import type { Gfn } from "../base/units.ts";
import type { DmaGate } from "../memory/gated-memory.ts";
import * as wire from "../wire/vhost-user.ts";
import { MemoryStore } from "./block-store.ts";
import { serveDisk } from "./disk.ts";
import { FrontEnd, memoryTable, USER_ADDRESS } from "./front-end.ts";

const open: DmaGate = {
  enter() {},
  leave() {},
  translate: (page) => page as Gfn,
  request: () => false,
  fault() {},
};
const hex = (text: string) => new Uint8Array(Buffer.from(text.replaceAll(/\s/g, ""), "hex"));

function setUp(frontEnd = new FrontEnd()) {
  const counters = { transfers: 0, bytes: 0, faults: 0, errors: 0, requests: 0 };
  const ended: (PeerError | HostError | undefined)[] = [];
  const disk = serveDisk({
    ports: frontEnd.ports,
    store: new MemoryStore(2048),
    gate: open,
    counters,
    onClose: (error) => ended.push(error),
  });
  return { frontEnd, disk, counters, ended };
}

const state = (index: number, num = 0) => wire.VringState.encode({ index, num });
const u64 = (value: bigint) => wire.VhostUserU64.encode({ value });

test("golden: all that QEMU 7.2 says until SeaBIOS has the disk, and what it wants to hear", () => {
  const { frontEnd, disk, counters } = setUp(new FrontEnd(2 ** 29));
  const index0 = "0000000000000000";
  for (const [request, reply, fds = 0] of [
    // GET_FEATURES: ACCESS_PLATFORM, VERSION_1, protocol features, FLUSH, BLK_SIZE, SEG_MAX
    ["01000000 01000000 00000000", "01000000 05000000 08000000 4402004003000000"],
    // GET_PROTOCOL_FEATURES: CONFIG, BACKEND_REQ, REPLY_ACK, MQ
    ["0f000000 01000000 00000000", "0f000000 05000000 08000000 2902000000000000"],
    ["10000000 01000000 08000000 2902000000000000", undefined],
    ["11000000 01000000 00000000", "11000000 05000000 08000000 0100000000000000"],
    // SET_BACKEND_REQ_FD, to be acknowledged; SET_OWNER; SET_VRING_CALL and _ERR
    ["15000000 09000000 00000000", "15000000 05000000 08000000 0000000000000000", 1],
    ["03000000 01000000 00000000", undefined],
    [`0d000000 01000000 08000000 ${index0}`, undefined, 1],
    [`0e000000 01000000 08000000 ${index0}`, undefined, 1],
    // GET_CONFIG of 57 bytes: capacity 2048, size_max 0, seg_max 126, geometry 0, blk_size 512, zeros
    [
      `18000000 01000000 45000000 000000003900000000000000 ${"00".repeat(57)}`,
      `18000000 05000000 45000000 000000003900000000000000
       0008000000000000 00000000 7e000000 00000000 00020000 ${"00".repeat(33)}`,
    ],
    ["02000000 01000000 08000000 4400004001000000", undefined],
    [
      "05000000 09000000 28000000 0100000000000000 0000000000000000 0000002000000000 00f0ff3b7f7f0000 0000000000000000",
      "05000000 05000000 08000000 0000000000000000",
      1,
    ],
    // SET_VRING_NUM 128, _BASE 0, _ADDR, _KICK, _ENABLE 1
    ["08000000 01000000 08000000 0000000080000000", undefined],
    ["0a000000 01000000 08000000 0000000000000000", undefined],
    [
      `09000000 01000000 28000000 ${index0}
       00c0fd5b7f7f0000 00d0fd5b7f7f0000 00c8fd5b7f7f0000 00e0fd1f00000000`,
      undefined,
    ],
    [`0c000000 01000000 08000000 ${index0}`, undefined, 1],
    ["12000000 01000000 08000000 0000000001000000", undefined],
    // Reset: _ENABLE 0, GET_VRING_BASE
    ["12000000 01000000 08000000 0000000000000000", undefined],
    [`0b000000 01000000 08000000 ${index0}`, `0b000000 05000000 08000000 ${index0}`],
  ] as [string, string | undefined, number?][]) {
    const sent = Array.from({ length: fds }, () => frontEnd.newFd());
    assert.deepEqual(frontEnd.raw(hex(request), sent), reply && hex(reply), request);
  }
  assert.equal(disk.session.refused, 0);
  assert.equal(counters.errors, 0);
  // Held: the channel for requests of ours, call and err. Not held: the memory table's, and the kick of a stopped ring.
  assert.equal(frontEnd.open.size, 3);
});

test("the configuration: its last byte, beyond its end, and never written", () => {
  const { frontEnd } = setUp();
  frontEnd.negotiate();
  const { VHOST_USER_GET_CONFIG, VHOST_USER_SET_CONFIG } = wire;
  const at = (offset: number, size: number, extra = size) => wire.ConfigHead.encode({ offset, size }, extra);
  assert.deepEqual(frontEnd.send(VHOST_USER_GET_CONFIG, at(255, 1)), at(255, 1));
  for (const bad of [at(256, 1), at(0, 257), at(2 ** 32 - 1, 1), at(0, 8, 4), new Uint8Array(3)])
    assert.equal(frontEnd.send(VHOST_USER_GET_CONFIG, bad)?.length, 0);
  assert.equal(frontEnd.acknowledged(VHOST_USER_SET_CONFIG, at(0, 1)), false);
});

const region = { gpa: 0, size: 4096, userAddress: USER_ADDRESS, mmapOffset: 0 };
const address = (at: number) => wire.VringAddr.encode({ descriptor: at, available: at, used: at });

/** What, request, payload, fds with it. The guest has 1 MiB of RAM at USER_ADDRESS; ring 0 has 16 entries. */
const refusals: [string, number, Uint8Array<ArrayBuffer>, number?][] = [
  ["unknown request", 99, hex("0102")],
  ["fds that nobody asked for", 99, hex(""), 2],
  ["short payload", wire.VHOST_USER_SET_VRING_NUM, hex("00000000")],
  ["long payload", wire.VHOST_USER_SET_OWNER, hex("00")],
  ["unknown ring", wire.VHOST_USER_SET_VRING_NUM, state(1, 16)],
  ["huge ring index", wire.VHOST_USER_SET_VRING_ENABLE, state(2 ** 32 - 1, 1)],
  ["ring size 0", wire.VHOST_USER_SET_VRING_NUM, state(0, 0)],
  ["ring size 24", wire.VHOST_USER_SET_VRING_NUM, state(0, 24)],
  ["ring size 2^31", wire.VHOST_USER_SET_VRING_NUM, state(0, 2 ** 31)],
  ["ring base 2^16", wire.VHOST_USER_SET_VRING_BASE, state(0, 65536)],
  ["ring outside RAM", wire.VHOST_USER_SET_VRING_ADDR, address(USER_ADDRESS + 2 ** 20)],
  ["ring beyond the end", wire.VHOST_USER_SET_VRING_ADDR, address(USER_ADDRESS + 2 ** 20 - 64)],
  ["ring at 2^64 - 1", wire.VHOST_USER_SET_VRING_ADDR, new Uint8Array(40).fill(0xff, 8)],
  ["misaligned ring", wire.VHOST_USER_SET_VRING_ADDR, address(USER_ADDRESS + 1)],
  ["9 regions", wire.VHOST_USER_SET_MEM_TABLE, memoryTable(...new Array(9).fill(region)), 9],
  ["overlap", wire.VHOST_USER_SET_MEM_TABLE, memoryTable(region, { ...region, mmapOffset: 4096 }), 2],
  ["beyond the file", wire.VHOST_USER_SET_MEM_TABLE, memoryTable({ ...region, mmapOffset: 2 ** 20 }), 1],
  ["half a frame", wire.VHOST_USER_SET_MEM_TABLE, memoryTable({ ...region, size: 2048 }), 1],
  ["region of nothing", wire.VHOST_USER_SET_MEM_TABLE, memoryTable({ ...region, size: 0 }), 1],
  ["region beyond 2^52", wire.VHOST_USER_SET_MEM_TABLE, memoryTable({ ...region, gpa: 2 ** 52 }), 1],
  ["region without fd", wire.VHOST_USER_SET_MEM_TABLE, memoryTable(region)],
  ["more fds than regions", wire.VHOST_USER_SET_MEM_TABLE, memoryTable(region), 3],
  [
    "fewer regions than said",
    wire.VHOST_USER_SET_MEM_TABLE,
    wire.MemoryTableHead.encode({ count: 2 }, 32),
    2,
  ],
  ["memory table of 3 bytes", wire.VHOST_USER_SET_MEM_TABLE, hex("010000"), 1],
  ["kick without fd", wire.VHOST_USER_SET_VRING_KICK, u64(0x100n)],
  ["kick that lacks its fd", wire.VHOST_USER_SET_VRING_KICK, u64(0n)],
  ["call with an fd that it denies", wire.VHOST_USER_SET_VRING_CALL, u64(0x100n), 1],
  ["call for an unknown ring", wire.VHOST_USER_SET_VRING_CALL, u64(7n), 1],
];

test("refused and answered, and nothing changes", () => {
  const { frontEnd, disk } = setUp();
  frontEnd.negotiate();
  frontEnd.acknowledged(wire.VHOST_USER_SET_VRING_NUM, state(0, 16));
  for (const [name, request, payload, fds = 0] of refusals) {
    const sent = Array.from({ length: fds }, () => frontEnd.newFd());
    assert.equal(frontEnd.acknowledged(request, payload, sent), false, name);
    assert.equal(frontEnd.open.size, 0, name);
  }
  assert.equal(disk.session.refused, refusals.length);
  // Without need_reply there is no answer at all.
  assert.equal(frontEnd.send(99), undefined);
  // The ring size and the table from before are still in force.
  assert.ok(frontEnd.acknowledged(wire.VHOST_USER_SET_VRING_ADDR, address(USER_ADDRESS)));
});

test("what cannot be answered or survived ends the session, and every fd is closed", () => {
  const endings: [string, (frontEnd: FrontEnd) => void, string | undefined][] = [
    ["QEMU leaves", (f) => f.raw(new Uint8Array(0)), undefined],
    ["half a header", (f) => f.raw(hex("010000")), undefined],
    ["huge size", (f) => f.raw(hex("05000000 01000000 ffffffff")), "ERR_COIOMMU_PROTOCOL"],
    ["wrong version", (f) => f.raw(hex("01000000 02000000 00000000")), "ERR_COIOMMU_PROTOCOL"],
    ["a reply", (f) => f.raw(hex("01000000 05000000 00000000")), "ERR_COIOMMU_PROTOCOL"],
    [
      "features that were not offered",
      (f) => f.u64(wire.VHOST_USER_SET_FEATURES, 1n),
      "ERR_COIOMMU_PROTOCOL",
    ],
    ["a vIOMMU of QEMU's", (f) => f.u64(wire.VHOST_USER_SET_FEATURES, 1n << 33n), "ERR_COIOMMU_PROTOCOL"],
    [
      "base of an unknown ring",
      (f) => f.send(wire.VHOST_USER_GET_VRING_BASE, state(3)),
      "ERR_COIOMMU_PROTOCOL",
    ],
  ];
  for (const [name, end, code] of endings) {
    const { frontEnd, ended } = setUp();
    frontEnd.negotiate();
    frontEnd.startRing();
    frontEnd.acknowledged(wire.VHOST_USER_SET_VRING_ERR, u64(0n), [frontEnd.newFd()]);
    frontEnd.send(wire.VHOST_USER_SET_BACKEND_REQ_FD, undefined, [frontEnd.newFd()]);
    assert.equal(frontEnd.open.size, 4);
    end(frontEnd);
    assert.deepEqual(
      ended.map((error) => error?.code),
      [code],
      name,
    );
    assert.ok(frontEnd.closed, name);
    assert.deepEqual([...frontEnd.open], [], name);
  }
});

test("a new fd replaces the old one, which is closed; no fd at all is fine for call and err", () => {
  const { frontEnd } = setUp();
  frontEnd.negotiate();
  const { kickFd, callFd } = frontEnd.startRing();
  const [kick, call, err] = [frontEnd.newFd(), frontEnd.newFd(), frontEnd.newFd()];
  assert.ok(frontEnd.acknowledged(wire.VHOST_USER_SET_VRING_KICK, u64(0n), [kick]));
  assert.ok(frontEnd.acknowledged(wire.VHOST_USER_SET_VRING_CALL, u64(0n), [call]));
  assert.ok(frontEnd.acknowledged(wire.VHOST_USER_SET_VRING_ERR, u64(0n), [err]));
  assert.deepEqual([...frontEnd.open], [kick, call, err]);
  assert.ok(!frontEnd.open.has(kickFd) && !frontEnd.open.has(callFd));
  assert.ok(frontEnd.acknowledged(wire.VHOST_USER_SET_VRING_CALL, u64(0x100n)));
  assert.ok(frontEnd.acknowledged(wire.VHOST_USER_SET_VRING_ERR, u64(0x100n)));
  assert.deepEqual([...frontEnd.open], [kick]);
});

test("a ring is served from its first kick on, while it is enabled, until its base is asked for", () => {
  const { frontEnd, counters } = setUp();
  frontEnd.negotiate();
  const { queue, kick, kickFd } = frontEnd.startRing();
  const flush = () => {
    frontEnd.memory.write(0x8000, hex("04000000 00000000 0000000000000000"));
    return queue.add([{ gpa: 0x8000 as never, length: 16 }], [{ gpa: 0x9000 as never, length: 1 }]);
  };
  flush();
  frontEnd.acknowledged(wire.VHOST_USER_SET_VRING_ENABLE, state(0, 0));
  kick();
  assert.equal(counters.requests, 0);
  frontEnd.acknowledged(wire.VHOST_USER_SET_VRING_ENABLE, state(0, 1));
  assert.equal(counters.requests, 1);
  assert.equal(frontEnd.acknowledged(wire.VHOST_USER_SET_VRING_NUM, state(0, 8)), false, "a running ring");
  flush();
  kick();
  assert.equal(counters.requests, 2);
  const base = frontEnd.send(wire.VHOST_USER_GET_VRING_BASE, state(0))!;
  assert.deepEqual(wire.VringState.read(base), { index: 0, num: 2 });
  assert.ok(!frontEnd.open.has(kickFd));
  flush();
  kick();
  assert.equal(counters.requests, 2);
  // Started again where it stopped.
  const again = frontEnd.newFd();
  frontEnd.acknowledged(wire.VHOST_USER_SET_VRING_KICK, u64(0n), [again]);
  frontEnd.kick(again);
  assert.equal(counters.requests, 3);
});

test("the disk masters the bus from the kick fd of its ring until that is stopped, and no longer than QEMU is there", () => {
  const { frontEnd } = setUp();
  frontEnd.negotiate();
  assert.equal(frontEnd.mastering, false);
  frontEnd.startRing();
  assert.equal(frontEnd.mastering, true, "before the first kick: its driver has posted buffers");
  frontEnd.acknowledged(wire.VHOST_USER_SET_VRING_KICK, u64(0n), [frontEnd.newFd()]);
  assert.equal(frontEnd.mastering, true);
  frontEnd.send(wire.VHOST_USER_GET_VRING_BASE, state(0, 0));
  assert.equal(frontEnd.mastering, false);
  frontEnd.startRing();
  assert.equal(frontEnd.mastering, true);
  frontEnd.raw(new Uint8Array(0));
  assert.equal(frontEnd.mastering, false);
});

test("a kick before the ring is laid out is an error of QEMU's, not of ours", () => {
  const { frontEnd, counters } = setUp();
  frontEnd.negotiate();
  const fd = frontEnd.newFd();
  frontEnd.acknowledged(wire.VHOST_USER_SET_VRING_ENABLE, state(0, 1));
  frontEnd.acknowledged(wire.VHOST_USER_SET_VRING_KICK, u64(0n), [fd]);
  frontEnd.kick(fd);
  assert.equal(counters.errors, 1);
});
