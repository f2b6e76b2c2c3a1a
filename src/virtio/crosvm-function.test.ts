import assert from "node:assert/strict";
import test from "node:test";
import { machine, RAM_FRAMES } from "../../test/support/machine.ts";
import { random } from "../../test/support/random.ts";
import { DISK } from "../../test/support/viommu.ts";
import type { Bdf } from "../base/units.ts";
import { COIOMMU_BAR_SIZE, CoiommuRegisters, PIN_PAGES_IN_BATCH, PinPagesInfo } from "../wire/crosvm.ts";
import { barRegister } from "../wire/pci.ts";
import { putUint } from "../wire/struct.ts";
import { CrosvmFunction } from "./crosvm-function.ts";

const [MMIO, SLOTS, TOPOLOGY] = [0x1_0000, 0x2_0000, 0x3_0000] as const;
const TRIGGERS = MMIO + CoiommuRegisters.size;
const LIST = 0x2_0000;

/** The function with its BARs mapped, and a table that is not activated yet. */
function fixture(quota = Number.POSITIVE_INFINITY) {
  const m = machine({ quota });
  const assigned = new Map([[DISK as Bdf, 0]]);
  for (const gfn of [0, 1024]) m.table.unit(gfn);
  const device = new CrosvmFunction({
    memory: m.memory,
    tracker: m.tracker,
    assigned,
    hostError: (error) => assert.fail(error),
  });
  [MMIO, SLOTS, TOPOLOGY].forEach((address, i) => void device.configWrite(barRegister(2 * i), 4, address));
  const register = (name: keyof typeof CoiommuRegisters.fields, value: number | bigint) =>
    device.barWrite(MMIO + CoiommuRegisters.fields[name].at, 8, BigInt(value));
  return {
    ...m,
    device,
    assigned,
    register,
    activateHere(root: number = m.table.root, levels: number | bigint = 2) {
      register("dttRoot", root);
      register("dttLevel", levels);
      register("command", 1);
      return m.tracker.life;
    },
    /** Ask through a slot; whether it is free afterwards. */
    ask(data: bigint, slot = 0): boolean {
      device.barWrite(SLOTS + 8 * slot, 8, data);
      device.barWrite(TRIGGERS + slot, 1, 1n);
      return device.barRead(SLOTS + 8 * slot, 8) === 0n;
    },
    /** A batch's list in guest memory; returns the slot's word. */
    batch(
      gfns: readonly (number | bigint)[],
      head: { bdf?: number; nrPages?: number } = {},
      at = LIST,
    ): bigint {
      const bytes = PinPagesInfo.encode({ bdf: DISK, nrPages: gfns.length, ...head }, 8 * gfns.length);
      gfns.forEach((gfn, i) => void putUint(bytes, PinPagesInfo.size + 8 * i, 8, BigInt(gfn)));
      m.memory.write(at, bytes);
      return BigInt(at) | PIN_PAGES_IN_BATCH;
    },
  };
}
const single = (gfn: number, bdf = DISK) => (BigInt(gfn) << 16n) | BigInt(bdf);

test("configuration space: identity, three BARs of 8 KiB, and nothing else that can be written", () => {
  const { device } = fixture();
  assert.deepEqual(
    [device.configRead(0, 4), device.configRead(8, 1), device.configRead(11, 1)],
    [0xabcd_1234, 0x10, 0xff],
  );
  for (const bar of [0, 2, 4]) {
    device.configWrite(barRegister(bar), 4, 0xffff_ffff);
    assert.equal(device.configRead(barRegister(bar), 4), 0xffff_e000);
  }
  for (const at of [0, 8, barRegister(1), barRegister(3), barRegister(5), 0x34, 0x40]) {
    const before = device.configRead(at, 4);
    device.configWrite(at, 4, 0xffff_ffff);
    assert.equal(device.configRead(at, 4), before, `0x${at.toString(16)}`);
  }
});

test("the topology BAR has the number of assigned functions and then each; writes to it are refused", () => {
  const { device } = fixture();
  assert.deepEqual([device.barRead(TOPOLOGY, 2), device.barRead(TOPOLOGY + 2, 2)], [1n, BigInt(DISK)]);
  device.barWrite(TOPOLOGY, 2, 9n);
  assert.deepEqual([device.barRead(TOPOLOGY, 2), device.peerErrors], [1n, 1]);
});

test("the topology BAR follows functions that come and go", () => {
  const { device, assigned } = fixture();
  const read = () => [0, 1, 2, 3].map((i) => Number(device.barRead(TOPOLOGY + 2 * i, 2)));
  assigned.set(0x28 as Bdf, 1);
  assert.deepEqual(read(), [2, DISK, 0x28, 0]);
  assigned.delete(DISK as Bdf);
  assert.deepEqual(read(), [1, 0x28, 0, 0]);
});

for (const [what, root, levels] of [
  ["a root that is not aligned", 0x60_0008, 2],
  ["a root outside RAM", RAM_FRAMES * 4096, 2],
  ["no levels", 0x60_0000, 0],
  ["too many levels", 0x60_0000, 6n],
  ["a level of 64 bits", 0x60_0000, 2n ** 63n],
] as const)
  test(`${what} is not activated, and what was active is not any more`, () => {
    const f = fixture();
    assert.equal(f.activateHere(), "tracked");
    assert.equal(f.activateHere(root, levels), "frozen");
    assert.equal(f.device.peerErrors, 1);
  });

test("a command in two halves counts when it is whole", () => {
  const f = fixture();
  f.register("dttRoot", f.table.root);
  f.register("dttLevel", 2);
  const at = MMIO + CoiommuRegisters.fields.command.at;
  f.device.barWrite(at, 4, 1n);
  assert.equal(f.tracker.active, false);
  f.device.barWrite(at + 4, 4, 0n);
  assert.equal(f.tracker.active, true);
});

test("park and unpark; a parked table is not aged", () => {
  const f = fixture();
  f.activateHere();
  f.register("command", 2);
  assert.equal(f.tracker.parked, true);
  f.register("command", 3);
  assert.equal(f.tracker.parked, false);
  f.register("command", 0);
  f.register("command", 2);
  assert.deepEqual([f.tracker.active, f.device.peerErrors], [false, 1]);
});

test("a slot is freed whatever was asked, and only what is right is pinned", () => {
  const f = fixture();
  f.activateHere();
  const ram = BigInt(RAM_FRAMES);
  const requests: [string, bigint, number[]][] = [
    ["one frame", single(3), [3]],
    ["of a function that is not assigned", single(4, 0x99), []],
    ["outside RAM", single(RAM_FRAMES), []],
    ["a frame of 47 bits", single(2 ** 46), []],
    ["a list", f.batch([5, 6, 5]), [5, 6]],
    ["an empty list", f.batch([], {}, LIST + 0x1000), []],
    ["a list of another function", f.batch([7], { bdf: 0x99 }, LIST + 0x2000), []],
    ["a list that is longer than RAM", f.batch([8], { nrPages: RAM_FRAMES + 1 }, LIST + 0x3000), []],
    ["a list with a frame of 64 bits", f.batch([9, 2n ** 63n], {}, LIST + 0x4000), []],
    ["a list behind RAM", (ram * 4096n) | PIN_PAGES_IN_BATCH, []],
    ["a list at the end of RAM", (ram * 4096n - 16n) | PIN_PAGES_IN_BATCH, []],
    ["a list at the end of the address space", PIN_PAGES_IN_BATCH - 1n + PIN_PAGES_IN_BATCH, []],
  ];
  f.memory.write(RAM_FRAMES * 4096 - 16, PinPagesInfo.encode({ bdf: DISK, nrPages: 3 }));
  const pinned = new Set<number>();
  for (const [what, data, gfns] of requests) {
    assert.ok(f.ask(data), what);
    for (const gfn of gfns) pinned.add(gfn);
    assert.deepEqual(new Set(f.tracker.frames()), pinned, what);
  }
});

test("a trigger of a free slot, or behind the slots, asks for nothing", () => {
  const f = fixture();
  f.activateHere();
  f.device.barWrite(TRIGGERS + 5, 1, 1n);
  f.device.barWrite(MMIO + COIOMMU_BAR_SIZE - 1, 1, 1n);
  assert.deepEqual([f.tracker.pinned, f.device.peerErrors], [0, 1]);
});

test("random accesses pin nothing outside RAM or above the quota, and never throw", () => {
  for (let seed = 1; seed <= 20; seed++) {
    const f = fixture(20);
    const next = random(seed);
    f.activateHere();
    for (let i = 0; i < 2000; i++) {
      const size = [1, 2, 4, 8][next(4)]!;
      const bar = [0, MMIO, SLOTS, TOPOLOGY][next(4)]!;
      const at = bar + (next(2) === 0 ? next(64) : next(COIOMMU_BAR_SIZE + 8));
      const value = next(3) === 0 ? single(next(RAM_FRAMES + 8)) : BigInt(next(2 ** 32)) << BigInt(next(33));
      if (next(8) === 0) f.device.barRead(at, size);
      else if (next(50) === 0) f.device.configWrite(next(64), 4, next(2 ** 32));
      else f.device.barWrite(at, size, BigInt.asUintN(8 * size, value));
      assert.ok(f.tracker.pinned <= 20);
    }
    for (const gfn of f.tracker.frames()) assert.ok(gfn < RAM_FRAMES);
  }
});

test("a machine reset releases everything and forgets what was asked", () => {
  const f = fixture();
  f.activateHere();
  f.ask(single(3));
  f.device.barWrite(SLOTS, 8, single(4));
  f.device.reset();
  assert.deepEqual(
    [f.tracker.pinned, f.tracker.active, f.device.configRead(barRegister(2), 4)],
    [0, false, 0],
  );
});
