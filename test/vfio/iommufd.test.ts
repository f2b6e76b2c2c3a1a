/**
 * IommufdPinner and IommufdDevice on a kernel that has iommufd, and on a function that COIOMMU_IOMMUFD_DEVICE names:
 * bound to vfio-pci, and nobody else's, because it is reset. An NVMe function shows that its DMA reaches what is pinned
 * and nothing else. No kernel of Debian has iommufd, so CI does not run this.
 */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { existsSync } from "node:fs";
import test from "node:test";
import { HostError, InvariantViolation } from "../../src/base/errors.ts";
import { FRAME_SIZE, type Gpa, type Iova } from "../../src/base/units.ts";
import type { Cpu } from "../../src/driver/cpu.ts";
import type { DmaApi } from "../../src/driver/dma-api.ts";
import { NvmeController, NvmeFailed } from "../../src/driver/nvme-controller.ts";
import { ioctl } from "../../src/host/ioctl.ts";
import { IommufdDevice, pinnerFor } from "../../src/host/iommufd-device.ts";
import { IommufdPinner } from "../../src/host/iommufd-pinner.ts";
import { SharedMapping } from "../../src/host/mapping.ts";
import { GuestMemory } from "../../src/memory/guest-memory.ts";
import { MmioRegisters } from "../../src/memory/mmio.ts";
import { IOMMU_IOAS_MAP, IOMMU_IOAS_UNMAP, IoasMap, IoasUnmap } from "../../src/wire/iommufd.ts";

const BDF = process.env.COIOMMU_IOMMUFD_DEVICE ?? "";
const skip = !existsSync("/dev/iommu")
  ? "this kernel has no /dev/iommu"
  : BDF === "" && "COIOMMU_IOMMUFD_DEVICE names no function that is bound to vfio-pci";

const FRAMES = 16_384;
const NVME = 0x010802;
/** An address below all that a process may map (vm.mmap_min_addr). */
const NOWHERE = 4096;

/** Guest memory from GPA 0 on, and a function that can reach what is pinned of it. */
function open(t: test.TestContext) {
  const device = IommufdDevice.open(BDF);
  const ram = new SharedMapping(FRAMES * FRAME_SIZE);
  const pinner = new IommufdPinner(device);
  t.after(() => {
    device.function.stopDma();
    pinner.close();
    assert.equal(pinner.kernelPinnedPages(), 0);
    pinner.close();
    device.close();
    ram.close();
  });
  const pin = (...gfns: number[]): Int32Array => {
    const handles = new Int32Array(gfns.length);
    pinner.pin(
      Float64Array.from(gfns, (gfn) => ram.address + gfn * FRAME_SIZE),
      gfns.length,
      handles,
      undefined,
      Int32Array.from(gfns),
    );
    return handles;
  };
  return { device, ram, pinner, pin };
}

const refusedWith = (errno: string) => (error: unknown) =>
  error instanceof HostError && error.syscall === "IOMMU_IOAS_MAP" && error.errno === errno;

test("`auto` picks iommufd for this function", { skip }, () => {
  assert.equal(pinnerFor(BDF), "iommufd");
});

test("the kernel counts exactly what is pinned, page by page and in extents", { skip }, (t) => {
  const { ram, pinner, pin } = open(t);
  const pages = Array.from({ length: 3000 }, (_, i) => 2 * i);
  const handles = pin(...pages);
  assert.equal(pinner.kernelPinnedPages(), 3000);
  assert.equal(pinner.release(handles, 1000), 1000);
  assert.equal(pinner.kernelPinnedPages(), 2000);
  const extent = pinner.pinExtent(ram.address + 8192 * FRAME_SIZE, 2 ** 25, 8192 * FRAME_SIZE);
  assert.equal(pinner.kernelPinnedPages(), 2000 + 8192);
  assert.equal(pinner.release(Int32Array.of(extent), 1), 1);
  const adjoins = new Uint8Array(2000).fill(1);
  assert.equal(pinner.release(handles.subarray(1000), 2000, adjoins), 2000, "over the holes, with one call");
  assert.equal(pinner.kernelPinnedPages(), 0);
  const neighbours = pin(...Array.from({ length: 512 }, (_, i) => i));
  assert.equal(pinner.release(neighbours, 512), 512, "with one call");
  assert.equal(pinner.kernelPinnedPages(), 0);
});

test("what cannot be pinned is refused with its reason, and nothing of the request is pinned", {
  skip,
}, (t) => {
  const { device, ram, pinner, pin } = open(t);
  const raw = (iova: number) => {
    const flags = 7;
    const map = {
      size: IoasMap.size,
      flags,
      ioasId: device.ioas,
      userVa: ram.address,
      length: FRAME_SIZE,
      iova,
    };
    return ioctl(device.iommufd, "IOMMU_IOAS_MAP", IOMMU_IOAS_MAP, IoasMap.encode(map));
  };
  const unmap = (iova: number, length: number) => {
    const range = { size: IoasUnmap.size, ioasId: device.ioas, iova, length };
    return ioctl(device.iommufd, "IOMMU_IOAS_UNMAP", IOMMU_IOAS_UNMAP, IoasUnmap.encode(range));
  };
  assert.throws(() => pin(1, 0xfee00), refusedWith("EINVAL"));
  assert.throws(() => raw(0xfee0_0000), { errno: "EINVAL" }, "the kernel says the same");
  raw(3 * FRAME_SIZE);
  assert.throws(() => pin(1, 2, 3), refusedWith("EEXIST"));
  unmap(3 * FRAME_SIZE, FRAME_SIZE);
  assert.throws(() => unmap(3 * FRAME_SIZE, FRAME_SIZE), { errno: "ENOENT" });
  const addresses = Float64Array.of(ram.address, NOWHERE);
  const pinBoth = () => pinner.pin(addresses, 2, new Int32Array(2), undefined, Int32Array.of(0, 1));
  assert.throws(pinBoth, refusedWith("EFAULT"));
  assert.equal(pinner.kernelPinnedPages(), 0);

  const extent = pinner.pinExtent(ram.address, 4 * FRAME_SIZE, 0);
  assert.throws(() => pin(2), InvariantViolation);
  assert.throws(() => unmap(FRAME_SIZE, FRAME_SIZE), { errno: "ENOENT" }, "a mapping is not split");
  assert.equal(pinner.kernelPinnedPages(), 4);
  assert.equal(pinner.release(Int32Array.of(extent), 1), 1);
});

/** Memory for a driver that is pinned when it is given, unless it is the page of this number, counted from 0. */
function pinnedDma(pinner: IommufdPinner, ram: SharedMapping, forgotten: number): DmaApi {
  let next = 16 * FRAME_SIZE;
  let pages = 0;
  const handles = new Map<number, number>();
  const ofRings: Pick<DmaApi, "allocCoherent" | "freeCoherent"> = {
    allocCoherent(length) {
      const gpa = next as Gpa;
      next += Math.ceil(length / FRAME_SIZE) * FRAME_SIZE;
      if (pages++ !== forgotten) handles.set(gpa, pinner.pinExtent(ram.address + gpa, next - gpa, gpa));
      return { gpa, iova: gpa as number as Iova };
    },
    freeCoherent(gpa) {
      const handle = handles.get(gpa);
      if (handle !== undefined) assert.equal(pinner.release(Int32Array.of(handle), 1), 1);
    },
  };
  return ofRings as DmaApi;
}

const cpu: Cpu = {
  waitFor(done, timeout) {
    for (const end = performance.now() + timeout / 1e6; performance.now() < end; ) if (done()) return true;
    return done();
  },
};

/** Bring the controller up; what it says of itself comes by DMA. */
function identity(t: test.TestContext, forgotten: number) {
  const { device, ram, pinner } = open(t);
  if (device.function.classCode !== NVME) return t.skip("this function is no NVMe controller");
  const bytes = SharedMapping.bytes(ram);
  const memory = new GuestMemory([
    { gpa: 0 as Gpa, size: ram.size, hostAddress: ram.address, bytes, presentAddress: undefined },
  ]);
  const bar = device.function.mapBar(0);
  const registers = new MmioRegisters(SharedMapping.bytes(bar));
  device.function.startDma();
  const controller = new NvmeController(
    { memory, dma: pinnedDma(pinner, ram, forgotten), registers, cpu },
    1,
  );
  controller.shutDown();
  return controller.identity;
}

test("an NVMe controller reaches what is pinned", { skip }, (t) => {
  const found = identity(t, -1);
  if (!found) return;
  t.diagnostic(`${found.model}, serial number ${found.serial}, ${found.size} bytes`);
  assert.ok(found.serial !== "" && found.size > 0);
});

test("broken twin: a page that is not pinned is not reached", { skip }, (t) => {
  // The third is the one that Identify fills, behind the two rings.
  try {
    assert.equal(identity(t, 2), undefined);
  } catch (error) {
    assert.ok(error instanceof NvmeFailed, String(error));
    assert.match(error.message, /no namespace 1|refuses Identify/);
  }
});

const NOBODY = 65_534;
/** Without CAP_IPC_LOCK once the device is open, and with a memlock limit of 1 MiB. */
const CHILD = `
  const { IommufdDevice } = await import(${JSON.stringify(import.meta.resolve("../../src/host/iommufd-device.ts"))});
  const { IommufdPinner } = await import(${JSON.stringify(import.meta.resolve("../../src/host/iommufd-pinner.ts"))});
  const { SharedMapping } = await import(${JSON.stringify(import.meta.resolve("../../src/host/mapping.ts"))});
  const device = IommufdDevice.open(process.env.COIOMMU_IOMMUFD_DEVICE);
  const pinner = new IommufdPinner(device);
  if (process.getuid() === 0) { process.setgid(${NOBODY}); process.setuid(${NOBODY}); }
  const ram = new SharedMapping(2 ** 22);
  const out = [];
  try { pinner.pinExtent(ram.address, 2 ** 21, 0); } catch (error) { out.push(error.errno, error.detail); }
  out.push(pinner.kernelPinnedPages());
  pinner.pinExtent(ram.address, 2 ** 19, 0);
  out.push(pinner.kernelPinnedPages());
  console.log(JSON.stringify(out));`;

test("at its memlock limit a process is refused with ENOMEM, and has what fits", { skip }, () => {
  const limited = 'ulimit -l 1024; exec "$0" --input-type=module -e "$1"';
  const run = spawnSync("sh", ["-c", limited, process.execPath, CHILD], { encoding: "utf8" });
  assert.equal(run.status, 0, run.stderr);
  assert.deepEqual(JSON.parse(run.stdout), [
    ...["ENOMEM", "2097152 bytes beyond the memlock limit of 1024 KiB, or the host has no memory"],
    ...[0, 128],
  ]);
});
