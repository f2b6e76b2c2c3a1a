import assert from "node:assert/strict";
import test from "node:test";
import { FakeClock } from "../../test/support/clock.ts";
import { HOST_BASE, ramRegion } from "../../test/support/guest.ts";
import { FakePinner } from "../../test/support/pinner.ts";
import type { Gfn, Gpa } from "../base/units.ts";
import { GuestMemory, type GuestRegion } from "../memory/guest-memory.ts";
import { createIommuBuffer, DeviceGate, SoftwareIommu } from "./software-iommu.ts";
import { StaticPins } from "./static-pins.ts";

const MIB = 2 ** 20;

function rig(regions: readonly GuestRegion[]) {
  const memory = new GuestMemory(regions);
  const pinner = new FakePinner();
  const buffer = createIommuBuffer(2 ** 20);
  const gate = new DeviceGate(buffer, 0, () => {});
  const pins = new StaticPins(memory, pinner, new SoftwareIommu(buffer, new FakeClock()));
  return {
    memory,
    pinner,
    pins,
    /** Pinned ranges, relative to HOST_BASE, in frames. */
    extents: () => pinner.extents.map(({ address, length }) => [(address - HOST_BASE) / 4096, length / 4096]),
    allows: (...gfns: number[]) => gfns.map((gfn) => gate.allows(gfn as Gfn)),
  };
}

test("all RAM is pinned and allowed, and nothing else", () => {
  const r = rig([ramRegion(0, 16), ramRegion(0x10_0000, 4)]);
  r.pins.cover();
  assert.deepEqual(r.extents(), [
    [0, 16],
    [256, 4],
  ]);
  assert.equal(r.pins.frames, 20);
  assert.deepEqual(r.allows(0, 15, 16, 255, 256, 259, 260), [true, true, false, false, true, true, false]);
});

test("nothing is pinned twice, however often the map is shown", () => {
  const r = rig([ramRegion(0, 16)]);
  for (let i = 0; i < 3; i++) r.pins.cover();
  assert.deepEqual(r.extents(), [[0, 16]]);
});

test("of regions that appear later, only what is not pinned yet is pinned: at both ends, in the middle, around", () => {
  const r = rig([ramRegion(8 * 4096, 4), ramRegion(20 * 4096, 4)]);
  r.pins.cover();
  r.memory.setRegions([ramRegion(4 * 4096, 24)]);
  r.pins.cover();
  assert.deepEqual(r.extents(), [
    [8, 4],
    [20, 4],
    [4, 4],
    [12, 8],
    [24, 4],
  ]);
  assert.equal(r.pins.frames, 24);
  assert.deepEqual(r.allows(3, 4, 8, 12, 27, 28), [false, true, true, true, true, false]);
});

test("the same host memory at another guest address is allowed there, and not pinned again", () => {
  const r = rig([ramRegion(0, 16)]);
  r.pins.cover();
  r.memory.setRegions([ramRegion(0, 16), ramRegion(64 * 4096, 4, HOST_BASE - 60 * 4096)]);
  r.pins.cover();
  assert.deepEqual(r.extents(), [[0, 16]]);
  assert.deepEqual(r.allows(64, 67, 68), [true, true, false]);
});

test("what the map hides stays pinned", () => {
  const r = rig([ramRegion(0, 16)]);
  r.pins.cover();
  r.memory.setRegions([ramRegion(0, 4)]);
  r.pins.cover();
  r.memory.setRegions([ramRegion(0, 16)]);
  r.pins.cover();
  assert.deepEqual([r.extents(), r.pins.frames], [[[0, 16]], 16]);
});

test("RAM is pinned in extents of 256 MiB; a host that refuses one can be asked again for the rest", () => {
  // 600 MiB that nobody touches: the host's memory is not committed.
  const bytes = new Uint8Array(new ArrayBuffer(600 * MIB));
  const r = rig([{ gpa: 0 as Gpa, size: bytes.length, hostAddress: HOST_BASE, bytes }]);
  r.pinner.pagesMax = 2;
  assert.throws(() => r.pins.cover(), { code: "ERR_COIOMMU_HOST", errno: "ENOMEM" });
  assert.equal(r.pins.frames, 2 * 65_536);
  assert.deepEqual(r.allows(0), [false], "devices see RAM that is pinned as a whole only");
  r.pinner.pagesMax = 3;
  r.pins.cover();
  assert.deepEqual(r.extents(), [
    [0, 65_536],
    [65_536, 65_536],
    [131_072, 22_528],
  ]);
  assert.deepEqual(r.allows(0, 153_599, 153_600), [true, true, false]);
});
