import assert from "node:assert/strict";
import { test } from "node:test";
import { FakeVfioKernel } from "../../test/support/vfio-kernel.ts";
import { HostError, UserError } from "../base/errors.ts";
import { reservedRanges, VfioDevice } from "./vfio-device.ts";

const BDF = "0000:00:06.0";
const open = (kernel: FakeVfioKernel) => VfioDevice.open(BDF, kernel);

test("a function is opened, does DMA when it is told to, and ends before what maps its memory", () => {
  const kernel = new FakeVfioKernel();
  const device = open(kernel);
  assert.deepEqual([...kernel.files.values()], ["/dev/vfio/vfio", "/dev/vfio/2", "device"]);
  assert.equal(kernel.files.get(device.container), "/dev/vfio/vfio");
  assert.deepEqual([device.function.classCode, kernel.mastering], [0x010802, false]);
  assert.equal(kernel.config[5]! & 4, 4, "INTx, which nobody would handle, is off");
  assert.deepEqual(device.function.mapBar(0), { address: 2 ** 30, size: 16_384 });
  device.function.startDma();
  device.function.stopDma();
  assert.deepEqual(kernel.log, ["master on", "master off", "reset"]);
  device.function.startDma();
  kernel.log.length = 0;
  device.close();
  device.close();
  device.function.stopDma();
  const closes = ["close device", "close /dev/vfio/2", "close /dev/vfio/vfio"];
  assert.deepEqual(kernel.log, ["master off", "reset", "unmap", ...closes]);
  assert.deepEqual([kernel.files.size, kernel.mapped.size, kernel.config[4]! & 6], [0, 0, 0]);
});

test("what firmware left mastering the bus is stopped when it is opened", () => {
  const kernel = new FakeVfioKernel();
  kernel.config[4] = 0x07;
  const device = open(kernel);
  assert.deepEqual([kernel.mastering, kernel.config[4]! & 2], [false, 2]);
  device.close();
});

test("a function that cannot be reset is stopped by its command register", () => {
  const kernel = new FakeVfioKernel();
  kernel.resets = false;
  const device = open(kernel);
  device.function.startDma();
  device.close();
  assert.equal(kernel.log[1], "master off");
  assert.ok(!kernel.log.includes("reset") && kernel.files.size === 0);
});

test("a reset that the host refuses is told, and everything is closed", () => {
  const kernel = new FakeVfioKernel();
  const device = open(kernel);
  device.function.mapBar(0);
  device.function.startDma();
  kernel.refused = { VFIO_DEVICE_RESET: "EAGAIN" };
  assert.throws(() => device.close(), { code: "ERR_COIOMMU_HOST", errno: "EAGAIN" });
  assert.deepEqual([kernel.mastering, kernel.files.size, kernel.mapped.size], [false, 0, 0]);
});

const driverOf = "/sys/bus/pci/devices/0000:00:06.0/driver";
const mistakes: readonly [string, (kernel: FakeVfioKernel) => unknown, RegExp][] = [
  ["no such function", (k) => k.folders["/sys/bus/pci/devices"]!.pop(), /no such PCI function; `lspci -D`/],
  [
    "no IOMMU",
    (k) => {
      k.links = {};
    },
    /no IOMMU stands before it; .*intel_iommu=on/,
  ],
  [
    "another driver",
    (k) => {
      k.links[driverOf] = "nvme";
    },
    /bound to nvme, not to vfio-pci; as root: modprobe vfio-pci; echo vfio-pci >\S+driver_override; echo 0000:00:06\.0 >\S+\/driver\/unbind; echo 0000:00:06\.0 >\S+drivers_probe$/,
  ],
  [
    "no driver",
    (k) => {
      k.links[driverOf] = undefined;
    },
    /bound to no driver, not to vfio-pci; as root: modprobe vfio-pci; echo vfio-pci >\S+; echo \S+ >\S+drivers_probe$/,
  ],
  [
    "no VFIO",
    (k) => {
      k.refused["/dev/vfio/vfio"] = "ENOENT";
    },
    /VFIO cannot be used: .*ENOENT; as root: modprobe vfio_iommu_type1/,
  ],
  [
    "another version of VFIO",
    (k) => {
      k.version = 1;
    },
    /version 1, and only version 0/,
  ],
  [
    "no IOMMU driver",
    (k) => {
      k.extensions = [7];
    },
    /no IOMMU of type 1 \(version 2\); as root: modprobe vfio_iommu_type1/,
  ],
  [
    "no permission",
    (k) => {
      k.refused["/dev/vfio/2"] = "EACCES";
    },
    /sudo chown \$USER \/dev\/vfio\/2/,
  ],
  [
    "somebody else's",
    (k) => {
      k.refused["/dev/vfio/2"] = "EBUSY";
    },
    /another process has it, or its group 2/,
  ],
  [
    "VFIO without an IOMMU",
    (k) => {
      k.refused["/dev/vfio/2"] = "ENOENT";
    },
    /VFIO has no IOMMU for it: \/dev\/vfio\/2: ENOENT/,
  ],
  [
    "a group that is not viable",
    (k) => {
      k.viable = false;
      k.folders["/sys/kernel/iommu_groups/2/devices"]!.push("0000:00:07.0", "0000:00:08.0");
      k.links["/sys/bus/pci/devices/0000:00:07.0/driver"] = "e1000e";
    },
    /group 2 is shared with 0000:00:07\.0 \(e1000e\), which must be bound to vfio-pci or to nothing; as root: echo/,
  ],
  [
    "no interrupt remapping",
    (k) => {
      k.refused.VFIO_SET_IOMMU = "EPERM";
    },
    /does not remap interrupts.*allow_unsafe_interrupts$/,
  ],
  [
    "no PCI function",
    (k) => {
      k.isPci = false;
    },
    /this is no PCI function/,
  ],
];
for (const [what, break_, sentence] of mistakes)
  test(`${what}: one sentence with what to do, and nothing is left open`, () => {
    const kernel = new FakeVfioKernel();
    break_(kernel);
    assert.throws(
      () => open(kernel),
      (error: Error) => {
        assert.ok(error instanceof UserError && error.message.startsWith(`${BDF}: `), String(error));
        assert.match(error.message, sentence);
        return true;
      },
    );
    assert.equal(kernel.files.size, 0);
  });

for (const call of [
  "VFIO_GET_API_VERSION",
  "VFIO_GROUP_GET_STATUS",
  "VFIO_GROUP_SET_CONTAINER",
  "VFIO_SET_IOMMU",
  "VFIO_GROUP_GET_DEVICE_FD",
  "VFIO_DEVICE_GET_INFO",
  "VFIO_DEVICE_GET_REGION_INFO",
])
  test(`${call} fails: the errno is told, and nothing is left open`, () => {
    const kernel = new FakeVfioKernel();
    kernel.refused[call] = "EIO";
    assert.throws(
      () => open(kernel),
      (error) => error instanceof HostError && error.errno === "EIO",
    );
    assert.equal(kernel.files.size, 0);
  });

test("reserved addresses: those that VFIO does not map over, and none where the kernel does not say", () => {
  const kernel = new FakeVfioKernel();
  assert.deepEqual(reservedRanges(BDF, kernel), [{ start: 0xfee0_0000, end: 0xfef0_0000 }]);
  kernel.texts = {};
  assert.deepEqual(reservedRanges(BDF, kernel), []);
});

test("a BAR that may not be mapped is refused", () => {
  const kernel = new FakeVfioKernel();
  kernel.barFlags = 3;
  const device = open(kernel);
  assert.throws(() => device.function.mapBar(0), { code: "ERR_COIOMMU_USER" });
  assert.throws(() => device.function.mapBar(1), { code: "ERR_COIOMMU_USER" });
  device.close();
});
