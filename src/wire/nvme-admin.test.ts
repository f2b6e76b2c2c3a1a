/** Golden numbers and bytes, by hand from the specifications; capabilities and data as QEMU 7.2 answers. */
import assert from "node:assert/strict";
import test from "node:test";
import * as nvme from "./nvme-admin.ts";

test("capabilities: those of QEMU's controller, and the largest that there are", () => {
  assert.deepEqual(nvme.nvmeCapabilities(0x0f01_07ff, 0x0040_1820), {
    ...{ queueSizeMax: 2048, readyMs: 7500, doorbellStride: 4, nvm: true, pageMin: 4096 },
  });
  assert.deepEqual(nvme.nvmeCapabilities(0xff00_ffff, 0x000f_000f), {
    ...{ queueSizeMax: 65_536, readyMs: 127_500, doorbellStride: 2 ** 17, nvm: false, pageMin: 2 ** 27 },
  });
});

test("doorbells: the submission queue's, with the completion queue's one stride behind", () => {
  assert.deepEqual(
    [nvme.nvmeDoorbell(0, 4), nvme.nvmeDoorbell(1, 4), nvme.nvmeDoorbell(3, 64)],
    [0x1000, 0x1008, 0x1180],
  );
});

test("packed words", () => {
  assert.equal(nvme.packQueueAttributes(32), 0x001f_001f);
  assert.equal(nvme.packQueue(2, 65_536), 0xffff_0002);
  assert.equal(nvme.packSubmission(0x8001), 0x8001_0001);
  assert.equal(nvme.packQueueCount(4), 0x0003_0003);
  assert.deepEqual([nvme.queuePairsOf(0x0003_0007), nvme.queuePairsOf(0xffff_0000)], [4, 1]);
});

test("a command, and the registers' places", () => {
  const raw = nvme.NvmeAdminCommand.encode({
    ...{ opcode: 5, cid: 0x1234, prp1: 0x1_2345_6000, cdw10: 0x001f_0001, cdw11: 1 },
  });
  const expected = new Uint8Array(64);
  expected.set([0x05, 0, 0x34, 0x12]);
  expected.set([0x00, 0x60, 0x45, 0x23, 0x01], 24);
  expected.set([0x01, 0x00, 0x1f, 0x00, 0x01], 40);
  assert.deepEqual(raw, expected);
  const { vs, cc, csts, aqa, asq, acq } = nvme.NvmeProperties.fields;
  assert.deepEqual(
    [vs, cc, csts, aqa, asq, acq].map((f) => f.at),
    [0x08, 0x14, 0x1c, 0x24, 0x28, 0x30],
  );
});

test("what a controller says of itself", () => {
  const raw = new Uint8Array(4096);
  raw.set(Buffer.from(`${"probe".padEnd(20) + "QEMU NVMe Ctrl".padEnd(40)}7.2.22  `), 4);
  raw[77] = 7;
  raw.set([0x40, 0x42, 0x0f, 0x00], 88);
  const { serial, model, firmware, mdts, rtd3e } = nvme.NvmeControllerData.read(raw);
  assert.deepEqual(
    [serial, model, firmware].map((ascii) => String.fromCharCode(...ascii)),
    ["probe".padEnd(20), "QEMU NVMe Ctrl".padEnd(40), "7.2.22  "],
  );
  assert.deepEqual([mdts, rtd3e], [7, 1_000_000]);
});

test("the format of a namespace: bits 6:5 of FLBAS count with more than 16 formats only", () => {
  const raw = new Uint8Array(4096);
  raw.set([0x00, 0x00, 0x08], 0);
  raw.set([7, 0x24], 25);
  raw.set([0x08, 0x00, 0x0c, 0x00], 128 + 4 * 4);
  const namespace = nvme.NvmeNamespaceData.read(raw);
  assert.deepEqual([namespace.nsze, nvme.lbaFormatAt(namespace)], [0x8_0000, 128 + 4 * 4]);
  assert.deepEqual(nvme.NvmeLbaFormat.read(raw, 128 + 4 * 4), { ms: 8, lbads: 12, rp: 0 });
  assert.equal(nvme.lbaFormatAt({ flbas: 0x24, nlbaf: 16 }), 128 + 4 * 20);
});
