import assert from "node:assert/strict";
import { test } from "node:test";
import { guestRam } from "./guest-ram.ts";
import type { Qmp } from "./qmp.ts";

const GIB = 2 ** 30;

/** QMP of a QEMU with 1 GiB of shared RAM, and with `memory` as its machine's property. */
const qemu = (memory: object): Qmp => {
  const answers: Record<string, (args: { property?: string }) => unknown> = {
    "query-memdev": () => [{ id: "ram", share: true }],
    "query-memory-size-summary": () => ({ "base-memory": GIB, "plugged-memory": 0 }),
    "qom-get": ({ property }) => (property === "type" ? "memory-backend-memfd" : memory),
  };
  return { execute: async (command: string, args = {}) => answers[command]!(args) } as unknown as Qmp;
};

test("the IOMMU's table covers RAM above the PCI hole, and RAM that may be plugged", async () => {
  assert.deepEqual(await guestRam(qemu({ size: GIB })), { memoryMiB: 1024, frames: (6 * GIB) / 4096 });
  const { frames } = await guestRam(qemu({ size: GIB, "max-size": 8 * GIB, slots: 3 }));
  assert.equal(frames, (16 * GIB) / 4096);
});

test("a guest that may grow beyond what a table covers is refused", async () => {
  const grows = qemu({ size: GIB, "max-size": 1024 * GIB, slots: 1 });
  await assert.rejects(guestRam(grows), /1024 GiB of RAM; coIOMMU covers less than 1 TiB/);
});
