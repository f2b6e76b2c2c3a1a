import assert from "node:assert/strict";
import fs from "node:fs";
import test from "node:test";
import type { Gpa } from "../base/units.ts";
import { GuestMemory } from "../memory/guest-memory.ts";
import { createMemfd, FdMapper } from "./mapping.ts";

const MiB = 2 ** 20;
const dup = (fd: number) => fs.openSync(`/proc/self/fd/${fd}`, "r+");
const mappings = () => fs.readFileSync("/proc/self/maps", "latin1").match(/memfd:coiommu-test/g)?.length ?? 0;

test("one mapping for all duplicates of a file, whose fds are closed", () => {
  const fd = createMemfd("coiommu-test", 4 * MiB);
  const mapper = new FdMapper();
  const before = fs.readdirSync("/proc/self/fd").length;
  const low = mapper.map(dup(fd), 0, MiB);
  const high = mapper.map(dup(fd), MiB, 3 * MiB);
  assert.equal(fs.readdirSync("/proc/self/fd").length, before);
  assert.equal(mappings(), 1);
  assert.equal(high.hostAddress, low.hostAddress + MiB);
  high.bytes[5] = 77;
  const byte = new Uint8Array(1);
  fs.readSync(fd, byte, 0, 1, MiB + 5);
  assert.equal(byte[0], 77);
  fs.writeSync(fd, Uint8Array.of(78), 0, 1, 6);
  assert.equal(low.bytes[6], 78);
  mapper.close();
  fs.closeSync(fd);
});

test("after close, views are empty and late use fails instead of crashing", () => {
  const mapper = new FdMapper();
  const { hostAddress, bytes } = mapper.map(createMemfd("coiommu-test", MiB), 0, MiB);
  const memory = new GuestMemory([{ gpa: 0 as Gpa, size: MiB, hostAddress, bytes }]);
  mapper.close();
  mapper.close();
  assert.equal(mappings(), 0);
  assert.equal(bytes.length, 0);
  assert.equal(bytes[0], undefined);
  assert.throws(() => memory.load16(0));
  assert.throws(() => memory.peek32(0));
  assert.throws(() => memory.write(0, Uint8Array.of(1)));
});

test("words beyond 2^31 of one region are reached, and nothing beyond its end", () => {
  const size = 12 * 2 ** 30;
  const mapper = new FdMapper();
  const { hostAddress, bytes } = mapper.map(createMemfd("coiommu-test", size), 0, size);
  const memory = new GuestMemory([{ gpa: (2 ** 32) as Gpa, size, hostAddress, bytes }]);
  const last = 2 ** 32 + size - 4;
  memory.store32(last, 7);
  assert.deepEqual([memory.load32(last), memory.peek32(last), bytes[size - 4]], [7, 7, 7]);
  assert.equal(memory.add32(last - 2 ** 32, 1), 0);
  for (const gpa of [last + 4, last - 1, last - 2])
    assert.throws(() => memory.peek32(gpa), { code: "ERR_COIOMMU_NOT_GUEST_RAM" }, `${gpa}`);
  mapper.close();
});

test("ranges outside the file are refused, and the fd is closed then too", () => {
  const mapper = new FdMapper();
  const fd = createMemfd("coiommu-test", MiB);
  const before = fs.readdirSync("/proc/self/fd").length;
  for (const [offset, size] of [
    [0, MiB + 1],
    [MiB, 4096],
    [-4096, 4096],
    [0, 0],
    [2 ** 60, 4096],
    [4096, Number.NaN],
  ] as const)
    assert.throws(() => mapper.map(dup(fd), offset, size), { code: "ERR_COIOMMU_PROTOCOL" });
  assert.equal(fs.readdirSync("/proc/self/fd").length, before);
  fs.closeSync(fd);
});

test("a guest of 256 GiB is mapped whole", () => {
  const mapper = new FdMapper();
  const size = 256 * 2 ** 30;
  const { hostAddress, bytes } = mapper.map(createMemfd("coiommu-test", size), 0, size);
  const memory = new GuestMemory([{ gpa: 0 as Gpa, size, hostAddress, bytes }]);
  memory.store16(size - 2, 0xbeef);
  assert.equal(memory.load16(size - 2), 0xbeef);
  mapper.close();
});

test("what cannot be mapped is a host error", () => {
  const mapper = new FdMapper();
  const readOnly = fs.openSync(import.meta.filename, "r");
  assert.throws(() => mapper.map(readOnly, 0, 16), { syscall: "mmap", errno: "EACCES" });
});
