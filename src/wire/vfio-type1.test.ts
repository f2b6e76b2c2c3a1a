/** Golden bytes, written by hand from Linux include/uapi/linux/vfio.h. The proof machine shows that the kernel agrees. */
import assert from "node:assert/strict";
import test from "node:test";
import { wordsOf } from "./struct.ts";
import { containerInfo, DmaMap, DmaUnmap } from "./vfio-type1.ts";

const hex = (text: string) => new Uint8Array(Buffer.from(text.replaceAll(/[\s|]/g, ""), "hex"));

test("MAP_DMA of a page, for reading and writing", () => {
  const value = { argsz: 32, flags: 3, vaddr: 0x7f12_3456_7000, iova: 0x1_fee0_0000, size: 0x1000 };
  const golden = hex("20000000 | 03000000 | 00705634127f0000 | 0000e0fe01000000 | 0010000000000000");
  assert.deepEqual(DmaMap.encode(value), golden);
  assert.deepEqual(DmaMap.read(golden), value);
  assert.deepEqual(wordsOf(DmaMap), { argsz: 0, flags: 1, vaddr: 2, iova: 4, size: 6 });
});

test("UNMAP_DMA of 8 GiB", () => {
  const value = { argsz: 24, flags: 0, iova: 0x40_0000_2000, size: 0x2_0000_0000 };
  const golden = hex("18000000 | 00000000 | 0020000040000000 | 0000000002000000");
  assert.deepEqual(DmaUnmap.encode(value), golden);
  assert.deepEqual(DmaUnmap.read(golden), value);
  assert.deepEqual(wordsOf(DmaUnmap), { argsz: 0, flags: 1, iova: 2, size: 4 });
});

/** An emulated VT-d of 39 bits: the capability of migration (2) between the two that count. */
const INFO = `78000000 | 03000000 | 00f0ffffffffffff | 18000000 | 00000000
  0100 0100 | 48000000 | 02000000 | 00000000 | 0000000000000000 ffffdffe00000000 | 0000f0fe00000000 ffffffff7f000000
  0200 0100 | 68000000 | 00000000 | 00000000 | 0010000000000000 | 0000001000000000
  0300 0100 | 00000000 | ffff0000 | 00000000`;

test("GET_INFO tells the smallest page, the ranges of IOVAs, and how many mappings are left", () => {
  assert.deepEqual(containerInfo(hex(INFO)), {
    smallestPage: 4096,
    ranges: Float64Array.of(0, 0xfedf_ffff, 0xfef0_0000, 0x7f_ffff_ffff),
    dmaAvail: 65535,
  });
});

test("GET_INFO of a kernel without capabilities", () => {
  const info = hex("10000000 | 01000000 | 0000010000000000 | 00000000 | 00000000");
  assert.deepEqual(containerInfo(info), { smallestPage: 65536, ranges: undefined, dmaAvail: undefined });
});
