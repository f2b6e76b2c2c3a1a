import assert from "node:assert/strict";
import test from "node:test";
import { DEVICE_FILE, FakeIommufdKernel } from "../../test/support/iommufd-kernel.ts";
import { UserError } from "../base/errors.ts";
import { IommufdDevice, pinnerFor } from "./iommufd-device.ts";

const BDF = "0000:00:06.0";

test("a function is bound and attached before it is used, and ends before its address space goes", () => {
  const kernel = new FakeIommufdKernel();
  const device = IommufdDevice.open(BDF, kernel);
  assert.equal(kernel.files.get(device.iommufd), "/dev/iommu");
  assert.deepEqual([...kernel.spaces], [device.ioas]);
  assert.deepEqual([device.function.classCode, kernel.mastering], [0x010802, false]);
  device.function.startDma();
  kernel.log.length = 0;
  device.close();
  device.close();
  assert.deepEqual(kernel.log, ["master off", "reset", "close device", "destroy", "close /dev/iommu"]);
  assert.deepEqual([kernel.files.size, kernel.spaces.size], [0, 0]);
});

const mistakes: readonly [string, (kernel: FakeIommufdKernel) => unknown, RegExp][] = [
  ["no such function", (k) => k.folders["/sys/bus/pci/devices"]!.pop(), /no such PCI function/],
  [
    "another driver",
    (k) => Object.assign(k.links, { [`/sys/bus/pci/devices/${BDF}/driver`]: "nvme" }),
    /bound to nvme/,
  ],
  [
    "no iommufd",
    (k) => Object.assign(k.refused, { "/dev/iommu": "ENOENT" }),
    /\/dev\/iommu: ENOENT; Linux 6\.6 .* or --pinner vfio$/,
  ],
  [
    "a VFIO without files of functions",
    (k) => Object.assign(k.folders, { [`/sys/bus/pci/devices/${BDF}/vfio-dev`]: [] }),
    /no file of its own for it; Linux 6\.6 .* or --pinner vfio$/,
  ],
  [
    "no permission for iommufd",
    (k) => Object.assign(k.refused, { "/dev/iommu": "EACCES" }),
    /this user may not use \/dev\/iommu; sudo chown \$USER \/dev\/iommu, or run as root$/,
  ],
  [
    "no permission",
    (k) => Object.assign(k.refused, { [DEVICE_FILE]: "EACCES" }),
    /sudo chown \$USER \/dev\/vfio\/devices\/vfio3/,
  ],
  [
    "no file behind the name",
    (k) => Object.assign(k.refused, { [DEVICE_FILE]: "ENXIO" }),
    /does not give it .*vfio3: ENXIO/,
  ],
  [
    "no interrupt remapping",
    (k) => Object.assign(k.refused, { VFIO_DEVICE_BIND_IOMMUFD: "EPERM" }),
    /does not remap interrupts.*echo 1 >\/sys\/module\/iommufd\/parameters\/allow_unsafe_interrupts$/,
  ],
  [
    "somebody else's",
    (k) => Object.assign(k.refused, { VFIO_DEVICE_BIND_IOMMUFD: "EBUSY" }),
    /another process has it, or a function that shares/,
  ],
  ["no PCI function", (k) => Object.assign(k, { isPci: false }), /no PCI function/],
];
for (const [what, prepare, message] of mistakes)
  test(`${what}: one sentence, and nothing is left open`, () => {
    const kernel = new FakeIommufdKernel();
    prepare(kernel);
    assert.throws(
      () => IommufdDevice.open(BDF, kernel),
      (error) => {
        assert.ok(error instanceof UserError, String(error));
        assert.match(error.message, new RegExp(`^${BDF}: `));
        assert.match(error.message, message);
        return true;
      },
    );
    assert.deepEqual([...kernel.files], []);
  });

for (const call of ["IOMMU_IOAS_ALLOC", "VFIO_DEVICE_BIND_IOMMUFD", "VFIO_DEVICE_ATTACH_IOMMUFD_PT"])
  test(`${call} fails: the errno is told, and nothing is left open`, () => {
    const kernel = new FakeIommufdKernel();
    kernel.refused[call] = "ENOMEM";
    assert.throws(() => IommufdDevice.open(BDF, kernel), {
      code: "ERR_COIOMMU_HOST",
      syscall: call,
      errno: "ENOMEM",
    });
    assert.deepEqual([...kernel.files], []);
  });

test("`auto` is iommufd where this process may open both files, and else VFIO's container; it leaves none open", () => {
  const picked = (change: (k: FakeIommufdKernel) => unknown) => {
    const kernel = new FakeIommufdKernel();
    change(kernel);
    const name = pinnerFor(BDF, kernel);
    assert.equal(kernel.files.size, 0);
    return name;
  };
  assert.equal(
    picked(() => {}),
    "iommufd",
  );
  assert.equal(
    picked((k) => Object.assign(k.folders, { [`/sys/bus/pci/devices/${BDF}/vfio-dev`]: [] })),
    "vfio",
  );
  assert.equal(
    picked((k) => Object.assign(k.refused, { "/dev/iommu": "ENOENT" })),
    "vfio",
  );
  assert.equal(
    picked((k) => Object.assign(k.refused, { [DEVICE_FILE]: "EACCES" })),
    "vfio",
  );
});
