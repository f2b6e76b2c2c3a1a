/** Golden bytes, written by hand from Linux include/uapi/linux/iommufd.h and vfio.h (6.12). */
import assert from "node:assert/strict";
import test from "node:test";
import * as iommufd from "./iommufd.ts";
import { type Fields, type Struct, type Value, wordsOf } from "./struct.ts";

const hex = (text: string) => new Uint8Array(Buffer.from(text.replaceAll(/[\s|]/g, ""), "hex"));

const covered = new Set<unknown>();
const golden = <F extends Fields>(layout: Struct<F>, bytes: string, value: Value<F>): void => {
  covered.add(layout);
  test(`${layout.name}: golden bytes`, () => {
    assert.deepEqual(layout.encode(value), hex(bytes));
    assert.deepEqual(layout.read(hex(bytes)), value);
  });
};

golden(iommufd.IommuDestroy, "08000000 | 02000000", { size: 8, id: 2 });
golden(iommufd.IoasAlloc, "0c000000 | 00000000 | 01000000", { size: 12, flags: 0, outIoasId: 1 });
golden(
  iommufd.IoasIovaRanges,
  "20000000 | 01000000 | 02000000 | 00000000 | 00705634127f0000 | 0010000000000000",
  {
    ...{ size: 32, ioasId: 1, numIovas: 2, reserved: 0, allowedIovas: 0x7f12_3456_7000 },
    outIovaAlignment: 4096,
  },
);
golden(
  iommufd.IoasMap,
  "28000000 | 07000000 | 01000000 | 00000000 | 00705634127f0000 | 0000200000000000 | 0000e0fe01000000",
  {
    ...{ size: 40, flags: 7, ioasId: 1, reserved: 0 },
    ...{ userVa: 0x7f12_3456_7000, length: 0x20_0000, iova: 0x1_fee0_0000 },
  },
);
golden(iommufd.IoasUnmap, "18000000 | 01000000 | 0000e0fe01000000 | 0000000002000000", {
  ...{ size: 24, ioasId: 1, iova: 0x1_fee0_0000, length: 0x2_0000_0000 },
});
golden(iommufd.DeviceBind, "10000000 | 00000000 | 0b000000 | 03000000", {
  ...{ argsz: 16, flags: 0, iommufd: 11, outDevid: 3 },
});
golden(iommufd.DeviceAttach, "0c000000 | 00000000 | 01000000", { argsz: 12, flags: 0, ptId: 1 });

test("every structure has golden bytes", () => {
  for (const [name, value] of Object.entries(iommufd))
    if (typeof value === "object") assert.ok(covered.has(value), `${name} has none`);
});

test("where the fields of what is mapped and unmapped are, in words", () => {
  const { userVa, length, iova } = wordsOf(iommufd.IoasMap);
  assert.deepEqual([userVa, length, iova], [4, 6, 8]);
  assert.deepEqual(wordsOf(iommufd.IoasUnmap), { size: 0, ioasId: 1, iova: 2, length: 4 });
});
