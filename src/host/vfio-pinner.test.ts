/** Against a fake of type 1; the same pinner meets the kernel in the proof machine (test/vfio). */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import test from "node:test";
import { FakeContainer } from "../../test/support/fake-iommu.ts";
import { HostError, InvariantViolation } from "../base/errors.ts";
import { canExceedMemlock } from "./limits.ts";
import { VfioPinner } from "./vfio-pinner.ts";

const PAGE = 4096;
/** Where this process has the guest's memory. */
const BASE = 0x7f12_3456_7000;
const address = (gpa: number) => BASE + gpa;

function setUp(change: Partial<FakeContainer> = {}) {
  const container = Object.assign(new FakeContainer(), change);
  const { iommu } = container;
  const pinner = new VfioPinner({ container: container.fd, ioctl: container.ioctl });
  /** GFNs, or [first GFN, number of frames]. */
  const pin = (...pins: (number | readonly [number, number])[]): Int32Array => {
    const each = pins.map((p) => (typeof p === "number" ? ([p, 1] as const) : p));
    const gfns = Int32Array.from(each, ([gfn]) => gfn);
    const addresses = Float64Array.from(each, ([gfn]) => address(gfn * PAGE));
    const pages = Int32Array.from(each, ([, frames]) => frames);
    const handles = new Int32Array(each.length);
    pinner.pin(addresses, each.length, handles, pages, gfns);
    return handles;
  };
  /** [GFN, frames] of each mapping; each is where it belongs. */
  const mapped = () =>
    iommu.table.map(([iova, at, length]) => {
      assert.equal(at, address(iova));
      return [iova / PAGE, length / PAGE];
    });
  const release = (...handles: number[]) => pinner.release(Int32Array.from(handles), handles.length);
  const calls = (name: string) => iommu.calls.filter((c) => c === `VFIO_IOMMU_${name}_DMA`).length;
  return { container, iommu, pinner, pin, mapped, release, calls };
}

type Machine = ReturnType<typeof setUp>;

/** What a pin is refused with; nothing is mapped by it. */
function refusal({ iommu, pinner, pin }: Machine, ...pins: Parameters<Machine["pin"]>): string {
  const before = [iommu.table, pinner.pinsLeft];
  try {
    pin(...pins);
  } catch (error) {
    assert.ok(error instanceof HostError, String(error));
    assert.equal(error.syscall, "VFIO_IOMMU_MAP_DMA");
    assert.deepEqual([iommu.table, pinner.pinsLeft], before);
    return `${error.errno}: ${error.detail}`;
  }
  return "pinned";
}

test("pages and extents are mapped at their GPAs, and the handle is the first frame", () => {
  const { pinner, pin, mapped } = setUp();
  assert.deepEqual([...pin(7, [16, 512], 0x7fff_fff)], [7, 16, 0x7fff_fff]);
  assert.equal(pinner.pinExtent(address(2 ** 32), 2 ** 30, 2 ** 32), 2 ** 20);
  assert.deepEqual(mapped(), [
    [7, 1],
    [16, 512],
    [2 ** 20, 2 ** 18],
    [0x7fff_fff, 1],
  ]);
  assert.equal(pinner.mapsOnce, true);
});

test("neighbours of one release go with one call, in the order given, and others with one each", () => {
  const { pin, mapped, release, calls } = setUp();
  pin([10, 5], 15, [16, 100], 200, 202, 203);
  assert.equal(release(10, 15, 16), 3);
  assert.equal(calls("UNMAP"), 1);
  assert.equal(release(203, 202), 2);
  assert.equal(calls("UNMAP"), 3);
  assert.deepEqual(mapped(), [[200, 1]]);
  assert.deepEqual([...pin([10, 106])], [10], "what has gone can be mapped again, in other pieces");
});

test("what adjoins goes with one call over the holes, and a mapping that is in one after all is our bug", () => {
  const { pinner, pin, mapped, calls } = setUp();
  pin(1, [3, 2], 9, 11, 20, 22, 24);
  const release = (...handles: number[]) =>
    pinner.release(Int32Array.from(handles), handles.length, Uint8Array.of(0, 1, 1, 0));
  assert.equal(release(1, 3, 9, 11), 4);
  assert.deepEqual(
    [calls("UNMAP"), mapped()],
    [
      2,
      [
        [20, 1],
        [22, 1],
        [24, 1],
      ],
    ],
  );
  assert.throws(() => release(20, 24), InvariantViolation);
});

test("what the kernel refuses to unmap stays pinned, and so does what follows", () => {
  const { iommu, pin, mapped, release } = setUp();
  pin(1, 3, 5, 6);
  iommu.fault = { call: "VFIO_IOMMU_UNMAP_DMA", errno: "EBUSY" };
  assert.equal(release(3, 5, 6), 0);
  assert.deepEqual(
    mapped(),
    [1, 3, 5, 6].map((gfn) => [gfn, 1]),
  );
  assert.equal(release(3, 5, 6), 3);
  assert.deepEqual(mapped(), [[1, 1]]);
});

test("a second release is our bug, and so is what the kernel unmaps less of", () => {
  const { iommu, pin, release, mapped } = setUp();
  pin(1, [2, 3]);
  assert.throws(() => release(3, 1), InvariantViolation, "3 is in the middle of a mapping");
  assert.deepEqual(mapped(), [
    [1, 1],
    [2, 3],
  ]);
  release(1);
  assert.throws(() => release(1), InvariantViolation);
  iommu.mappings.clear();
  assert.throws(() => release(2), InvariantViolation);
});

const HOLE = "the IOMMU reserves IOVAs 0xfee00000 to 0xfeefffff: no memory of the guest can be there";
for (const [what, pins, detail] of [
  ["a page in the hole", [1, 0xfee01], HOLE],
  ["an extent that reaches into the hole", [1, [0xfedff, 2]], HOLE],
  ["an extent around the hole", [[0xfedff, 0x200]], HOLE],
  [
    "a page beyond the width",
    [1, 2 ** 27],
    "the IOMMU has IOVAs up to 0x7fffffffff only: no memory of the guest can be beyond",
  ],
  [
    "a page whose frame no handle can number",
    [1, 2 ** 31],
    "IOVA 0x80000000000 is beyond the 8 TiB that can be pinned",
  ],
] as const)
  test(`${what} is refused with its reason, before anything is mapped`, () => {
    const machine = setUp();
    assert.equal(refusal(machine, ...pins), `EINVAL: ${detail}`);
    assert.equal(machine.calls("MAP"), 0);
  });

test("pages at both edges of the hole, and the last one of the width, are mapped", () => {
  const { pin, mapped } = setUp();
  const frames = [0, 0xfedff, 0xfef00, 2 ** 27 - 1];
  pin(...frames);
  assert.deepEqual(
    mapped(),
    frames.map((gfn) => [gfn, 1]),
  );
});

for (const [what, errno, prepare, pins, detail] of [
  [
    "a page that somebody else has mapped",
    "EEXIST",
    ({ iommu }: Machine) => iommu.map(BASE, 3 * PAGE, PAGE),
    [1, [2, 2]],
    "somebody else has mapped some of IOVAs 0x2000 to 0x3fff",
  ],
  [
    "a page without memory",
    "EFAULT",
    ({ iommu }: Machine) => iommu.absent.add(address(9 * PAGE)),
    [1, [8, 2]],
    "this process has no memory that can be written at 0x7f123456f000 to 0x7f1234570fff",
  ],
  [
    "what a device that was attached since has reserved",
    "EINVAL",
    ({ iommu }: Machine) => Object.assign(iommu, { ranges: [2 ** 20, 2 ** 32 - 1] }),
    [0x200, 1],
    "the IOMMU reserves IOVAs 0x0 to 0xfffff: no memory of the guest can be there",
  ],
  [
    "what the kernel finds no other reason to refuse",
    "EINVAL",
    ({ iommu }: Machine) => Object.assign(iommu, { fault: { call: "VFIO_IOMMU_MAP_DMA", errno: "EINVAL" } }),
    [1],
    "IOVAs 0x1000 to 0x1fff or address 0x7f1234568000 are not whole pages of this IOMMU",
  ],
  [
    "a device that is gone",
    "ENODEV",
    ({ iommu }: Machine) => Object.assign(iommu, { fault: { call: "VFIO_IOMMU_MAP_DMA", errno: "ENODEV" } }),
    [1],
    "IOVAs 0x1000 to 0x1fff",
  ],
] as const)
  test(`${errno}, ${what}: nothing of the request is mapped, and the error says why`, () => {
    const machine = setUp();
    prepare(machine);
    assert.equal(refusal(machine, ...pins), `${errno}: ${detail}`);
  });

test("EEXIST, by a mapping of its own: our bug, whether it begins there or reaches there", () => {
  const { pin, mapped } = setUp();
  pin([8, 4]);
  for (const again of [8, 10, [6, 3]] as const) assert.throws(() => pin(20, again), InvariantViolation);
  assert.deepEqual(mapped(), [[8, 4]]);
});

test("ENOMEM: all or nothing, and the limit has room for what fits", () => {
  const machine = setUp();
  const { iommu, pin, mapped } = machine;
  iommu.memlock = 3 * PAGE;
  assert.match(refusal(machine, 1, 2, [8, 2]), /^ENOMEM: /);
  pin(1, [8, 2]);
  assert.match(refusal(machine, 20), /^ENOMEM: /);
  assert.equal(mapped().length, 2);
});

/** Run as an unprivileged user with 1 MiB of memlock, or as whom the host lets lock all. */
function reasonOfNoMemory(...before: string[]): string {
  const load = (path: string) => `await import(${JSON.stringify(import.meta.resolve(path))})`;
  const child = `
    const { FakeContainer } = ${load("../../test/support/fake-iommu.ts")};
    const { VfioPinner } = ${load("./vfio-pinner.ts")};
    const container = new FakeContainer();
    container.iommu.memlock = 0;
    const pinner = new VfioPinner({ container: container.fd, ioctl: container.ioctl });
    try { pinner.pinExtent(4096, 8192, 4096); } catch (error) { console.log(error.detail); }`;
  const command = [...before, process.execPath, "--input-type=module", "-e", child];
  const run = spawnSync(command[0]!, command.slice(1), { encoding: "utf8", cwd: "/" });
  assert.equal(run.status, 0, run.stderr);
  return run.stdout.trim();
}

test("ENOMEM says the memlock limit where there is one, and else that the host has no memory", () => {
  const limit = ["prlimit", "--memlock=1048576:1048576"];
  const unprivileged = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"];
  assert.equal(
    reasonOfNoMemory(...(process.getuid?.() === 0 ? unprivileged : []), ...limit),
    "8192 bytes beyond the memlock limit of 1024 KiB, or the host has no memory",
  );
  if (canExceedMemlock()) assert.equal(reasonOfNoMemory(...limit), "the host has no memory for 8192 bytes");
});

test("ENOSPC: at the limit of mappings nothing is tried, until one has gone", () => {
  const machine = setUp({ entryLimit: 3 });
  const { pinner, pin, release, calls } = machine;
  assert.deepEqual([pinner.pinsMax, pinner.pinsLeft], [3, 3]);
  pin(1, [8, 100]);
  assert.deepEqual([pinner.pinsNow, pinner.pinsLeft], [2, 1]);
  const full = "more mappings, and 1 of 3 are free: the module parameter dma_entry_limit of vfio_iommu_type1";
  assert.equal(refusal(machine, 200, 202), `ENOSPC: 2 ${full}`);
  assert.equal(calls("MAP"), 2);
  pin(200);
  assert.match(refusal(machine, 22), /^ENOSPC: 1 more mappings, and 0 of 3 are free/);
  release(8);
  pin(22);
  assert.deepEqual([pinner.pinsMax, pinner.pinsLeft], [3, 0]);
});

test("ENOSPC, because somebody else maps there too: what is left is what the kernel says", () => {
  const machine = setUp({ entryLimit: 3 });
  const { iommu, pinner } = machine;
  iommu.map(BASE, 2 ** 32, PAGE);
  iommu.map(BASE, 2 ** 33, PAGE);
  assert.throws(() => machine.pin(1, 2), { errno: "ENOSPC" });
  assert.deepEqual([pinner.pinsLeft, iommu.mappings.size], [1, 2]);
  machine.pin(1);
  iommu.mappings.delete(2 ** 32);
  machine.pin(2);
  assert.equal(pinner.pinsLeft, 0);
});

test("a kernel that tells neither ranges nor room is asked for each mapping", () => {
  const machine = setUp({ hasCapabilities: false, entryLimit: 1 });
  assert.deepEqual([machine.pinner.pinsMax, machine.pinner.pinsLeft], [undefined, undefined]);
  assert.equal(
    refusal(machine, 0xfee00),
    "EINVAL: IOVAs 0xfee00000 to 0xfee00fff or address 0x7f1333367000 are not whole pages of this IOMMU",
  );
  assert.match(refusal(machine, 1, 2), /^ENOSPC: 1 more mappings, and too few are free/);
});

test("more ranges than the first answer has room for are asked for again", () => {
  const container = new FakeContainer();
  container.iommu.ranges = Array.from({ length: 400 }, (_, i) => (i % 2 ? i * PAGE - 1 : i * PAGE));
  const pinner = new VfioPinner({ container: container.fd, ioctl: container.ioctl });
  pinner.pinExtent(BASE, PAGE, 398 * PAGE);
  assert.throws(() => pinner.pinExtent(BASE, PAGE, 397 * PAGE), /reserves IOVAs 0x18d000 to 0x18dfff/);
});

test("an IOMMU without pages of 4 KiB is refused when the pinner is made", () => {
  assert.throws(
    () => setUp({ pageSizes: 0xffff_ffff_ffff_0000n }),
    /EINVAL .the pages of this IOMMU are larger than 4 KiB/,
  );
});

for (const hasUnmapAll of [true, false])
  test(`close unmaps all, ${hasUnmapAll ? "with one call" : "neighbours at once, where the kernel has no call for all"}`, () => {
    const { pinner, pin, mapped, calls, iommu } = setUp({ hasUnmapAll });
    pin(9, [10, 512], 5, 1000);
    pinner.close();
    assert.deepEqual([iommu.table, calls("UNMAP")], [[], hasUnmapAll ? 1 : 3]);
    pinner.close();
    assert.equal(calls("UNMAP"), hasUnmapAll ? 1 : 3, "nothing is left to unmap");
    pin([9, 2]);
    assert.deepEqual([mapped(), pinner.pinsLeft], [[[9, 2]], 65534]);
  });

test("what is no whole page, or too long, is our bug", () => {
  const { pinner, calls } = setUp();
  assert.throws(() => pinner.pinExtent(BASE, PAGE, 2 ** 32 + 512), InvariantViolation);
  assert.throws(() => pinner.pinExtent(BASE, 2 ** 30 + PAGE, 0), InvariantViolation);
  assert.throws(() => pinner.pinExtent(BASE, 0, 0), InvariantViolation);
  assert.throws(() => pinner.pin(Float64Array.of(BASE), 1, new Int32Array(1)), InvariantViolation);
  assert.equal(calls("MAP"), 0);
});

test("what the process has locked already is not what was pinned", () => {
  const { pinner } = setUp();
  assert.deepEqual([pinner.kernelPinnedPages(), pinner.kernelSource], [0, "VmLck"]);
});
