import assert from "node:assert/strict";
import { test } from "node:test";
import { MmioRegisters } from "./mmio.ts";

test("registers are read and written whole, as unsigned words", () => {
  const bytes = new Uint8Array(64);
  const registers = new MmioRegisters(bytes.subarray(16, 48));
  registers.store32(0, 0xfedc_ba98);
  registers.store32(28, 1);
  assert.deepEqual([registers.load32(0), registers.load32(28), registers.load32(4)], [0xfedc_ba98, 1, 0]);
  assert.deepEqual([...bytes.subarray(16, 20)], [0x98, 0xba, 0xdc, 0xfe]);
  assert.equal(bytes[44], 1);
});

for (const at of [2, -4, 32, Number.NaN])
  test(`there is no register at ${at}: a store there is a bug, and is not lost in silence`, () => {
    const registers = new MmioRegisters(new Uint8Array(32));
    assert.throws(() => registers.store32(at, 1), /no register/);
    assert.throws(() => registers.load32(at), /no register/);
  });
