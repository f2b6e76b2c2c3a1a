/** Golden numbers and bytes, by hand from include/uapi/linux/vfio.h of Linux 6.1. */
import assert from "node:assert/strict";
import test from "node:test";
import * as vfio from "./vfio.ts";

test("the requests have the kernel's numbers", () => {
  assert.deepEqual(
    [vfio.VFIO_GET_API_VERSION, vfio.VFIO_CHECK_EXTENSION, vfio.VFIO_SET_IOMMU],
    [0x3b64, 0x3b65, 0x3b66],
  );
  assert.deepEqual(
    [vfio.VFIO_GROUP_GET_STATUS, vfio.VFIO_GROUP_SET_CONTAINER, vfio.VFIO_GROUP_GET_DEVICE_FD],
    [0x3b67, 0x3b68, 0x3b6a],
  );
  assert.deepEqual(
    [vfio.VFIO_DEVICE_GET_INFO, vfio.VFIO_DEVICE_GET_REGION_INFO, vfio.VFIO_DEVICE_RESET],
    [0x3b6b, 0x3b6c, 0x3b6f],
  );
});

for (const [layout, hex, value] of [
  [vfio.VfioGroupStatus, "08000000 03000000", { argsz: 8, flags: 3 }],
  [vfio.VfioFd, "ffffffff", { fd: -1 }],
  [vfio.VfioFd, "12000000", { fd: 18 }],
  [
    vfio.VfioDeviceInfo,
    "10000000 03000000 09000000 05000000",
    { argsz: 16, flags: vfio.VFIO_DEVICE_FLAGS_RESET | vfio.VFIO_DEVICE_FLAGS_PCI, regions: 9, irqs: 5 },
  ],
  // A configuration space, as Linux 6.1 describes that of a PCIe function.
  [
    vfio.VfioRegionInfo,
    "20000000 03000000 07000000 00000000 0010000000000000 0000000000070000",
    { argsz: 32, flags: 3, index: 7, capOffset: 0, size: 4096, offset: 7 * 2 ** 40 },
  ],
] as const)
  test(`${layout.name}, ${hex}: read and written`, () => {
    const bytes = Uint8Array.from(Buffer.from(hex.replaceAll(" ", ""), "hex"));
    assert.equal(bytes.length, layout.size);
    assert.deepEqual(layout.read(bytes), value);
    assert.deepEqual(layout.encode(value as never), bytes);
  });
