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
GatedMemory.prototype.transfer = function (gpa, length, each) {
  transfer.call(this, gpa, length, (piece, done) => {
    const before = hash(piece);
    each(piece, done);
    // What the disk only reads does not change.
    if (hash(piece) === before) return;
    for (let at = -(gpa + done) & (FRAME - 1); at + FRAME <= piece.length; at += FRAME)
      written.set((gpa + done + at) / FRAME, hash(piece.subarray(at, at + FRAME)));
  });
};

process.on("exit", () => writeFileSync(process.env.COIOMMU_TEST_WRITTEN!, JSON.stringify([...written])));
new DiskThread(workerData).run();
