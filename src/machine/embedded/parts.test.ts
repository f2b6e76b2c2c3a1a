import assert from "node:assert/strict";
import test from "node:test";
import { type Gfn, milliseconds } from "../../base/units.ts";
import { FramePool } from "../../driver/pages.ts";
import { Bell } from "../../memory/bell.ts";
import { GuestMemory } from "../../memory/guest-memory.ts";
import { DeviceRegisters, Doorbells, doorbellsBuffer } from "./doorbells.ts";
import { OwnedRam, ramEnd, ramRegions } from "./ram.ts";
import { ThreadCpu } from "./thread-cpu.ts";

test("doorbells: each write rings, the latest value counts, and an unchanged one is no news", () => {
  const buffer = doorbellsBuffer(3);
  const bell = new Bell(Bell.buffer());
  const driver = new Doorbells(buffer, bell);
  const device = new DeviceRegisters(buffer);
  const changes = () => {
    const found: (readonly [number, number])[] = [];
    device.changed((register, value) => found.push([register, value]));
    return found;
  };
  assert.deepEqual(changes(), []);
  driver.write(2, 7);
  driver.write(0, 1);
  driver.write(0, 4);
  assert.deepEqual(
    [bell.rings, changes(), changes()],
    [
      3,
      [
        [0, 4],
        [2, 7],
      ],
      [],
    ],
  );
  device.set(1, 9);
  assert.deepEqual([driver.read(1), changes()], [9, []]);
});

test("RAM of either kind: zero, whole, and the same bytes through every view", () => {
  for (const pinned of [false, true]) {
    const owned = new OwnedRam(1, pinned);
    const [a, b] = [new GuestMemory(ramRegions(owned.ram)), new GuestMemory(ramRegions(owned.ram))];
    assert.equal(a.size, 2 ** 20);
    assert.equal(a.add32(4096, 3), 0);
    assert.equal(b.load32(4096), 3);
    assert.equal(a.hostAddress(4096) > 2 ** 20, pinned, "only what is to be pinned has an address");
  }
});

test("RAM around a hole: what would be there comes behind it, and is handed out by nobody", () => {
  const [start, size] = [2 ** 19, 2 ** 18];
  const owned = new OwnedRam(1, true, { start, size });
  const memory = new GuestMemory(ramRegions(owned.ram));
  assert.deepEqual([memory.size, ramEnd(owned.ram)], [2 ** 20, 2 ** 20 + size]);
  assert.deepEqual([memory.find(start - 1, 2), memory.find(start + size - 1, 1)], [undefined, undefined]);
  assert.equal(memory.hostAddress(start + size), memory.hostAddress(start - 4096) + 4096);
  const pool = new FramePool(memory, 1 as Gfn, ramEnd(owned.ram) / 4096);
  const frames = new Set(Array.from({ length: 255 }, () => pool.allocate(1)!));
  assert.equal(pool.allocate(1), undefined, "255 frames are there: 0 is not in the pool");
  assert.equal(frames.size, 255);
  assert.ok([...frames].every((gpa) => memory.find(gpa, 4096)));
});

test("more RAM than the machine can reserve is the user's error", () => {
  assert.throws(() => new OwnedRam(2 ** 24, false), { code: "ERR_COIOMMU_USER" });
});

test("a CPU waits until it is done, or until the time is over", () => {
  const cpu = new ThreadCpu();
  let asked = 0;
  assert.ok(cpu.waitFor(() => ++asked === 3, milliseconds(1000)));
  assert.equal(asked, 3);
  const began = performance.now();
  assert.ok(!cpu.waitFor(() => false, milliseconds(20)));
  assert.ok(performance.now() - began >= 20);
});
