import assert from "node:assert/strict";
import test from "node:test";
import {
  ConfigHead,
  memoryTableRegion,
  memoryTableSize,
  VHOST_USER_SET_VRING_ADDR,
  VhostUserHeader,
  VringAddr,
} from "./vhost-user.ts";

const hex = (text: string) => Buffer.from(text.replaceAll(/\s/g, ""), "hex");

// The two messages are from a run of QEMU 7.2 with 512 MiB.
test("SET_VRING_ADDR", () => {
  const message = hex(`09000000 01000000 28000000
    00000000 00000000 00c09a507f7f0000 40c99a507f7f0000 00c89a507f7f0000 40d99a1400000000`);
  assert.deepEqual(VhostUserHeader.read(message), { request: VHOST_USER_SET_VRING_ADDR, flags: 1, size: 40 });
  assert.deepEqual(VringAddr.read(message, VhostUserHeader.size), {
    index: 0,
    flags: 0,
    descriptor: 0x7f7f509ac000,
    used: 0x7f7f509ac940,
    available: 0x7f7f509ac800,
    log: 0x149ad940,
  });
});

test("SET_MEM_TABLE, and a second region follows the first without a gap", () => {
  const payload = hex(
    "01000000 00000000 0000000000000000 0000002000000000 00f0ff3b7f7f0000 0000000000000000",
  );
  assert.equal(payload.length, memoryTableSize(1));
  const region = { gpa: 0, size: 2 ** 29, userAddress: 0x7f7f3bfff000, mmapOffset: 0 };
  assert.deepEqual(memoryTableRegion(payload, 0), region);
  assert.deepEqual(memoryTableRegion(Buffer.concat([payload, payload.subarray(8)]), 1), region);
});

test("GET_CONFIG of 60 bytes", () => {
  assert.deepEqual(
    ConfigHead.encode({ offset: 0, size: 60 }),
    new Uint8Array(hex("000000003c00000000000000")),
  );
});
