/** What differs from VfioPinner, whose tests cover the rest; test/vfio/iommufd.test.ts runs where there is an iommufd. */
import assert from "node:assert/strict";
import test from "node:test";
import { FakeIommufd } from "../../test/support/fake-iommu.ts";
import { InvariantViolation } from "../base/errors.ts";
import { IoUringPinner } from "./io-uring-pinner.ts";
import { IommufdPinner } from "./iommufd-pinner.ts";
import { createMemfd, FdMapper } from "./mapping.ts";

// In CI a missing real part fails.
const skip = process.env.CI ? false : (IoUringPinner.unavailable() ?? false);

const PAGE = 4096;
const BASE = 0x7f12_3456_7000;

function setUp(change: Partial<FakeIommufd> = {}) {
  const iommufd = Object.assign(new FakeIommufd(), change);
  const { iommu } = iommufd;
  const pinner = new IommufdPinner({ iommufd: iommufd.fd, ioas: iommufd.ioas, ioctl: iommufd.ioctl });
  const pin = (...gfns: number[]): Int32Array => {
    const handles = new Int32Array(gfns.length);
    pinner.pin(
      Float64Array.from(gfns, (gfn) => BASE + gfn * PAGE),
      gfns.length,
      handles,
      undefined,
      Int32Array.from(gfns),
    );
    return handles;
  };
  const release = (...handles: number[]) => pinner.release(Int32Array.from(handles), handles.length);
  const frames = () => iommu.table.map(([iova]) => iova / PAGE);
  const unmaps = () => iommu.calls.filter((name) => name === "IOMMU_IOAS_UNMAP").length;
  return { iommufd, iommu, pinner, pin, release, frames, unmaps };
}

test("pages and extents are mapped at their GPAs, and neighbours go with one call", () => {
  const { iommu, pinner, pin, release, unmaps } = setUp();
  assert.deepEqual([...pin(7, 8, 0x7fff_fff)], [7, 8, 0x7fff_fff]);
  assert.equal(pinner.pinExtent(BASE + 9 * PAGE, 2 ** 30, 9 * PAGE), 9);
  assert.deepEqual(iommu.table, [
    [7 * PAGE, BASE + 7 * PAGE, PAGE],
    [8 * PAGE, BASE + 8 * PAGE, PAGE],
    [9 * PAGE, BASE + 9 * PAGE, 2 ** 30],
    [2 ** 39 - PAGE, BASE + 2 ** 39 - PAGE, PAGE],
  ]);
  assert.equal(release(7, 8, 9), 3);
  assert.deepEqual([iommu.mappings.size, unmaps()], [1, 1]);
  pin(20, 30);
  assert.equal(pinner.release(Int32Array.of(20, 30), 2, Uint8Array.of(0, 1)), 2);
  assert.deepEqual([iommu.mappings.size, unmaps()], [1, 2], "and so does what adjoins");
});

test("there is no limit of mappings, and the kernel counts pages as pinned", () => {
  const { pinner } = setUp();
  assert.deepEqual(
    [pinner.name, pinner.mapsOnce, pinner.pinsMax, pinner.pinsLeft],
    ["iommufd", true, undefined, undefined],
  );
  assert.deepEqual([pinner.kernelSource, pinner.kernelPinnedPages()], ["VmPin", 0]);
});

for (const [what, errno, detail, gfn] of [
  ["a page in the hole", "EINVAL", /reserves IOVAs 0xfee00000 to 0xfeefffff/, 0xfee00],
  ["a page beyond the width", "EINVAL", /up to 0x7fffffffff only/, 2 ** 27],
  ["a page that somebody else has mapped", "EEXIST", /somebody else/, 100],
  ["a page without memory", "EFAULT", /no memory that can be written/, 200],
  ["a page beyond the memlock limit", "ENOMEM", /memory/, 300],
] as const)
  test(`${what}: ${errno}, and nothing of the request is mapped`, () => {
    const { iommu, pin, frames } = setUp();
    iommu.map(BASE, 100 * PAGE, PAGE);
    iommu.absent.add(BASE + 200 * PAGE);
    iommu.memlock = 3 * PAGE;
    assert.throws(
      () => pin(1, 2, gfn),
      (error: { syscall?: string; errno?: string; detail: string }) => {
        assert.deepEqual([error.syscall, error.errno], ["IOMMU_IOAS_MAP", errno]);
        assert.match(error.detail, detail);
        return true;
      },
    );
    assert.deepEqual(frames(), [100]);
  });

test("what is pinned twice, and what somebody else has unmapped, are our bugs", () => {
  const { iommu, pin, release, frames } = setUp();
  pin(1, 2, 3);
  assert.throws(() => pin(2), InvariantViolation);
  iommu.mappings.delete(3 * PAGE);
  assert.throws(() => release(3), InvariantViolation, "the kernel has nothing there");
  assert.throws(() => release(4), InvariantViolation);
  assert.deepEqual(frames(), [1, 2]);
});

test("what the kernel refuses to unmap stays pinned", () => {
  const { iommu, pin, release, frames } = setUp();
  pin(1, 5);
  iommu.fault = { call: "IOMMU_IOAS_UNMAP", errno: "EBUSY" };
  assert.equal(release(5, 1), 0);
  assert.equal(release(5, 1), 2);
  assert.deepEqual(frames(), []);
});

test("close unmaps all with one call, and the pinner can be used again", () => {
  const { pinner, pin, frames, unmaps } = setUp();
  pin(1, 5, 1000);
  pinner.close();
  pinner.close();
  assert.deepEqual([frames(), unmaps()], [[], 1]);
  pin(5);
  assert.deepEqual(frames(), [5]);
});

test("more ranges than the first answer has room for are asked for again", () => {
  const iommufd = new FakeIommufd();
  iommufd.iommu.ranges = Array.from({ length: 400 }, (_, i) => (i % 2 ? i * PAGE - 1 : i * PAGE));
  const pinner = new IommufdPinner({ iommufd: iommufd.fd, ioas: iommufd.ioas, ioctl: iommufd.ioctl });
  pinner.pinExtent(BASE, PAGE, 398 * PAGE);
  assert.throws(() => pinner.pinExtent(BASE, PAGE, 397 * PAGE), /reserves IOVAs 0x18d000 to 0x18dfff/);
});

test("an address space whose pages are larger, or that is not there, is refused when the pinner is made", () => {
  assert.throws(() => setUp({ alignment: 65536 }), { errno: "EINVAL" });
  const { fd, ioctl } = new FakeIommufd();
  assert.throws(() => new IommufdPinner({ iommufd: fd, ioas: 6, ioctl }), { errno: "ENOENT" });
});

test("what the process had pinned before is not counted", { skip }, (t) => {
  const mapper = new FdMapper();
  const before = new IoUringPinner();
  t.after(() => {
    before.close();
    mapper.close();
  });
  const { hostAddress } = mapper.map(createMemfd("pins", 5 * PAGE), 0, 5 * PAGE);
  before.pinExtent(hostAddress, 5 * PAGE);
  assert.deepEqual([before.kernelPinnedPages(), setUp().pinner.kernelPinnedPages()], [5, 0]);
});
