/**
 * Golden bytes of every wire structure, written by hand from the documents that define them. Each is decoded and
 * encoded. What is not covered: whether the documents are what QEMU and Linux do; the tests with a VM show that.
 */
import assert from "node:assert/strict";
import test from "node:test";
import * as mpqemu from "./mpqemu.ts";
import * as pci from "./pci.ts";
import { type Fields, le16, le32, le64, type Struct, struct } from "./struct.ts";
import * as viommu from "./virtio-iommu.ts";
import * as virtqueue from "./virtqueue.ts";

interface Vector {
  readonly layout: Struct<Fields>;
  readonly value: Record<string, unknown>;
  /** Bytes, with blanks and `|` between fields; "N*0" is N zero bytes. */
  readonly hex: string;
}

const vector = <F extends Fields>(
  layout: Struct<F>,
  hex: string,
  value: Record<keyof F, unknown>,
): Vector => ({
  layout: layout as unknown as Struct<Fields>,
  value,
  hex,
});
const zeros = (n: number) => new Uint8Array(n);
const of = (...values: number[]) => Uint8Array.from(values);

const vectors: readonly Vector[] = [
  // VIRTIO 1.2 section 5.13.4, and abi.md section 3 "Configuration" from byte 64 on.
  vector(
    viommu.Config,
    `00f0ffffffffffff | 0010000000000000 | ffffffffffffff00 | 01000000 | ff000000 | 40000000 | 01 | 3*0 | 24*0 |
     00e0cdab01000000 | 0000785634120000 | 03 | 02 | 84 | 01 | 80000000 | ffffffffffffffff`,
    {
      pageSizeMask: 0xffff_ffff_ffff_f000n,
      inputStart: 0x1000n,
      inputEnd: 0x00ff_ffff_ffff_ffffn,
      domainStart: 1,
      domainEnd: 255,
      probeSize: 64,
      bypass: 1,
      reserved: zeros(3),
      unused: zeros(24),
      assignedBitmap: 0x1_abcd_e000,
      dttRoot: 0x1234_5678_0000,
      dttLevels: 3,
      pinControl: 2,
      pinStatus: 0x84,
      pinFlags: 1,
      pinBatchMax: 128,
      pinQuota: 0xffff_ffff_ffff_ffffn,
    },
  ),
  // VIRTIO 1.2 section 5.13.6.
  vector(viommu.ReqHead, "40 | 010203", { type: 0x40, reserved: of(1, 2, 3) }),
  vector(viommu.ReqTail, "08 | 3*0", { status: 8, reserved: zeros(3) }),
  vector(viommu.ReqAttach, "01 | 3*0 | 44332211 | 08000000 | 01000000 | 4*0", {
    type: 1,
    headReserved: zeros(3),
    domain: 0x1122_3344,
    endpoint: 8,
    flags: 1,
    reserved: zeros(4),
  }),
  vector(viommu.ReqDetach, "02 | 3*0 | 44332211 | 18000100 | 8*0", {
    type: 2,
    headReserved: zeros(3),
    domain: 0x1122_3344,
    endpoint: 0x1_0018,
    reserved: zeros(8),
  }),
  vector(
    viommu.ReqMap,
    "03 | 3*0 | 07000000 | 0010000001000000 | ff1f000001000000 | 0030000002000000 | 03000000",
    {
      type: 3,
      headReserved: zeros(3),
      domain: 7,
      virtStart: 0x1_0000_1000n,
      virtEnd: 0x1_0000_1fffn,
      physStart: 0x2_0000_3000,
      flags: 3,
    },
  ),
  vector(viommu.ReqUnmap, "04 | 3*0 | 07000000 | 0010000001000000 | ff1f000001000000 | 4*0", {
    type: 4,
    headReserved: zeros(3),
    domain: 7,
    virtStart: 0x1_0000_1000n,
    virtEnd: 0x1_0000_1fffn,
    reserved: zeros(4),
  }),
  vector(viommu.ReqProbe, "05 | 3*0 | 20000000 | 64*0", {
    type: 5,
    headReserved: zeros(3),
    endpoint: 0x20,
    reserved: zeros(64),
  }),
  // abi.md section 3 "PIN request".
  vector(viommu.ReqPin, "40 | 3*0 | 20000000 | 00000000 | 02000000", {
    type: 0x40,
    headReserved: zeros(3),
    endpoint: 0x20,
    flags: 0,
    nrRanges: 2,
  }),
  vector(viommu.PinRange, "8967452301000000 | 10000000 | 00000000", {
    gfn: 0x1_2345_6789,
    nrFrames: 16,
    reserved: 0,
  }),
  // VIRTIO 1.2 section 5.13.6.7 and 5.13.6.9: 0xfee00000 to 0xfeefffff are interrupts.
  vector(viommu.ProbeResvMem, "0100 | 1400 | 01 | 3*0 | 0000e0fe00000000 | ffffeffe00000000", {
    type: 1,
    length: 20,
    subtype: 1,
    reserved: zeros(3),
    start: 0xfee0_0000,
    end: 0xfeef_ffff,
  }),
  vector(viommu.Fault, "02 | 3*0 | 02010000 | 20000000 | 4*0 | 00f0debc9a780000", {
    reason: 2,
    reserved: zeros(3),
    flags: 0x102,
    endpoint: 0x20,
    reserved2: 0,
    address: 0x789a_bcde_f000,
  }),
  // VIRTIO 1.2 sections 2.7.5, 2.7.6 and 2.7.8.
  vector(virtqueue.Desc, "0030000002000000 | 00020000 | 0300 | 2a00", {
    addr: 0x2_0000_3000,
    len: 512,
    flags: 3,
    next: 42,
  }),
  vector(virtqueue.UsedElem, "2a000000 | 04030201", { id: 42, len: 0x0102_0304 }),
  vector(virtqueue.RingHead, "0100 | fefe", { flags: 1, idx: 0xfefe }),
  // PCI Local Bus 3.0, figure 6-1; the values of a modern virtio-iommu, VIRTIO 1.2 section 4.1.2.
  vector(
    pci.PciHeader,
    `f41a | 5710 | 0604 | 1000 | 01 | 00 | 80 | 08 | 10 | 20 | 00 | 00 | 00c0dffe | 20*0 | 00000000 | f41a | 0011 |
     00000000 | 40 | 7*0 | 0b | 01 | 02 | 03`,
    {
      vendorId: 0x1af4,
      deviceId: 0x1057,
      command: 0x0406,
      status: 0x10,
      revision: 1,
      progIf: 0,
      subclass: 0x80,
      baseClass: 8,
      cacheLine: 0x10,
      latency: 0x20,
      headerType: 0,
      bist: 0,
      bar0: 0xfedf_c000,
      bars: zeros(20),
      cardbus: 0,
      subsystemVendorId: 0x1af4,
      subsystemId: 0x1100,
      rom: 0,
      capabilities: 0x40,
      reserved: zeros(7),
      interruptLine: 11,
      interruptPin: 1,
      minGrant: 2,
      maxLatency: 3,
    },
  ),
  // VIRTIO 1.2 sections 4.1.4, 4.1.4.4 and 4.1.4.3.
  vector(pci.VirtioPciCap, "09 | 50 | 10 | 01 | 04 | 02 | 0000 | 00200000 | 38000000", {
    vndr: 9,
    next: 0x50,
    length: 16,
    cfgType: 1,
    bar: 4,
    id: 2,
    padding: 0,
    offset: 0x2000,
    size: 56,
  }),
  vector(pci.VirtioPciNotifyCap, "09 | 00 | 14 | 02 | 00 | 00 | 0000 | 00300000 | 00100000 | 04000000", {
    vndr: 9,
    next: 0,
    length: 20,
    cfgType: 2,
    bar: 0,
    id: 0,
    padding: 0,
    offset: 0x3000,
    size: 0x1000,
    multiplier: 4,
  }),
  vector(
    pci.VirtioPciCommonCfg,
    `01000000 | 01000000 | 00000000 | 50000100 | ffff | 0200 | 0f | 07 | 0100 | 4000 | fffe | 0100 | 0300 |
     0010000001000000 | 0020000002000000 | 00300000000000f0`,
    {
      deviceFeatureSelect: 1,
      deviceFeature: 1,
      driverFeatureSelect: 0,
      driverFeature: 0x1_0050,
      configMsixVector: 0xffff,
      numQueues: 2,
      deviceStatus: 15,
      configGeneration: 7,
      queueSelect: 1,
      queueSize: 64,
      queueMsixVector: 0xfeff,
      queueEnable: 1,
      queueNotifyOff: 3,
      queueDesc: 0x1_0000_1000n,
      queueDriver: 0x2_0000_2000n,
      queueDevice: 0xf000_0000_0000_3000n,
    },
  ),
  // QEMU 7.2 include/hw/remote/mpqemu-link.h, as its compiler lays it out on x86-64.
  vector(mpqemu.MPQemuHeader, "05000000 | 4*0 | 1800000000000000", { command: 5, padding: 0, size: 24 }),
  vector(mpqemu.MPQemuRet, "ffffffffffffffff", { value: 0xffff_ffff_ffff_ffffn }),
  vector(mpqemu.MPQemuPciConfig, "10000000 | ffffffff | 04000000", {
    address: 16,
    value: 0xffff_ffff,
    length: 4,
  }),
  vector(mpqemu.MPQemuBarAccess, "0020e0fe00000000 | 8877665544332211 | 08000000 | 01 | 3*0", {
    address: 0xfee0_2000,
    value: 0x1122_3344_5566_7788n,
    size: 8,
    memory: 1,
    padding: zeros(3),
  }),
  vector(mpqemu.MPQemuRegion, "0000000001000000 | 0000004000000000 | 0000008000000000", {
    gpa: 0x1_0000_0000,
    size: 0x4000_0000,
    offset: 0x8000_0000,
  }),
];

const bytesOf = (hex: string): Buffer =>
  Buffer.from(hex.replace(/(\d+)\*0/g, (_, n) => "00".repeat(Number(n))).replace(/[\s|]/g, ""), "hex");

/** What of the vector the layout gets wrong. */
function mistakes({ layout, value, hex }: Vector): string[] {
  const golden = bytesOf(hex);
  if (layout.size !== golden.length) return ["size"];
  const decoded = layout.read(golden);
  const wrong = Object.keys(value).filter((key) => !isEqual(decoded[key], value[key]));
  return Buffer.from(layout.encode(value)).equals(golden) ? wrong : [...wrong, "encoding"];
}

function isEqual(a: unknown, b: unknown): boolean {
  return a instanceof Uint8Array && b instanceof Uint8Array ? Buffer.from(a).equals(b) : a === b;
}

for (const v of vectors) test(`${v.layout.name}: golden bytes`, () => assert.deepEqual(mistakes(v), []));

test("every structure of these files has a vector", () => {
  const covered = new Set(vectors.map((v) => v.layout));
  for (const module of [mpqemu, pci, viommu, virtqueue])
    for (const [name, value] of Object.entries(module))
      if (typeof value === "object" && "fields" in value)
        assert.ok(covered.has(value as unknown as Struct<Fields>), `${name} has no vector`);
});

test("broken twin: a layout with two fields swapped is caught", () => {
  const twin = struct("virtq_desc", 16, { addr: le64(0), len: le32(8), next: le16(12), flags: le16(14) });
  const v = vector(twin, "0030000002000000 | 00020000 | 0300 | 2a00", {
    addr: 0x2_0000_3000,
    len: 512,
    flags: 3,
    next: 42,
  });
  assert.deepEqual(mistakes(v), ["flags", "next", "encoding"]);
});

test("SyncSysmemMsg: three arrays of 8, entry by entry", () => {
  const payload = bytesOf(
    `0000000000000000 0000000001000000 48*0
     0000000800000000 0000004000000000 48*0
     0000000000000000 0000000800000000 48*0`,
  );
  assert.equal(payload.length, mpqemu.SYSMEM_SIZE);
  assert.deepEqual(
    [0, 1, 7].map((i) => mpqemu.sysmemEntry(payload, i)),
    [
      { gpa: 0, size: 0x0800_0000, offset: 0 },
      { gpa: 0x1_0000_0000, size: 0x4000_0000, offset: 0x0800_0000 },
      { gpa: 0, size: 0, offset: 0 },
    ],
  );
});

test("the parts of a split queue have the sizes of VIRTIO 1.2 section 2.7, without event fields", () => {
  const { descTableSize, availRingSize, usedRingSize, availOffset, usedOffset } = virtqueue;
  assert.deepEqual([descTableSize(64), availRingSize(64), usedRingSize(64)], [1024, 132, 516]);
  assert.deepEqual([availOffset(3), usedOffset(3)], [10, 28]);
});
