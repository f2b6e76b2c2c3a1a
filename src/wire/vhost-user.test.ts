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

test("SET_VRING_ADDR as QEMU 7.2 sent it", () => {
  const message = hex(`09000000 01000000 28000000
    00000000 00000000 0040d1be 4f7f0000 4048d1be 4f7f0000 0048d1be 4f7f0000 4048d106 00000000`);
  assert.deepEqual(VhostUserHeader.read(message), { request: VHOST_USER_SET_VRING_ADDR, flags: 1, size: 40 });
  assert.deepEqual(VringAddr.read(message, VhostUserHeader.size), {
    index: 0,
    flags: 0,
    descriptor: 0x7f4fbed14000,
    used: 0x7f4fbed14840,
    available: 0x7f4fbed14800,
    log: 0x06d14840,
  });
});

test("the regions of a memory table follow its head without a gap", () => {
  const payload = hex(`02000000 00000000
    0000000000000000 00000a0000000000 0000e09e4f7f0000 0000000000000000
    00000c0000000000 0000f41f00000000 0000ec9e4f7f0000 00000c0000000000`);
  assert.equal(payload.length, memoryTableSize(2));
  assert.deepEqual(memoryTableRegion(payload, 1), {
    gpa: 0xc0000,
    size: 0x1ff40000,
    userAddress: 0x7f4f9eec0000,
    mmapOffset: 0xc0000,
  });
});

test("GET_CONFIG of 60 bytes", () => {
  assert.deepEqual(
    ConfigHead.encode({ offset: 0, size: 60 }),
    new Uint8Array(hex("000000003c00000000000000")),
  );
});
