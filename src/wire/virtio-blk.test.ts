import assert from "node:assert/strict";
import test from "node:test";
import { VIRTIO_BLK_T_OUT, VirtioBlkConfig, VirtioBlkReqHead } from "./virtio-blk.ts";

const hex = (text: string) => Buffer.from(text.replaceAll(/\s/g, ""), "hex");

test("request head", () => {
  const head = hex("01000000 00000000 8877665544332211");
  assert.deepEqual(VirtioBlkReqHead.read(head), {
    type: VIRTIO_BLK_T_OUT,
    reserved: 0,
    sector: Number(0x1122334455667788n),
  });
});

test("configuration of a 64 MiB disk", () => {
  assert.deepEqual(
    Buffer.from(VirtioBlkConfig.encode({ capacity: 131072, segMax: 126, blkSize: 512 })),
    hex("0000020000000000 00000000 7e000000 0000 00 00 00020000 0000000000000000"),
  );
});
