/** The disk of a VM that writes down, when it ends, what it put last into each whole frame of the guest. */
import { createHash } from "node:crypto";
import { writeFileSync } from "node:fs";
import { workerData } from "node:worker_threads";
import { DiskThread } from "../../src/control/disk.ts";
import { GatedMemory } from "../../src/memory/gated-memory.ts";

const FRAME = 4096;
const written = new Map<number, string>();
const hash = (bytes: Uint8Array) => createHash("sha1").update(bytes).digest("hex");

const { transfer } = GatedMemory.prototype;
GatedMemory.prototype.transfer = function (gpa, length, each, access) {
  const record = (piece: Uint8Array, done: number) => {
    each(piece, done);
    for (let at = -(gpa + done) & (FRAME - 1); at + FRAME <= piece.length; at += FRAME)
      written.set((gpa + done + at) / FRAME, hash(piece.subarray(at, at + FRAME)));
  };
  transfer.call(this, gpa, length, access === "write" ? record : each, access);
};

process.on("exit", () => writeFileSync(process.env.COIOMMU_TEST_WRITTEN!, JSON.stringify([...written])));
new DiskThread(workerData).run();
