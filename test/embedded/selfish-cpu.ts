/**
 * A guest CPU whose driver claims all that it gets and gives none of it to its device. It leaves IDLE frames behind
 * first, which a request at the quota has to unpin before one may be refused.
 */
import { workerData } from "node:worker_threads";
import { FRAME_SIZE, type Gpa } from "../../src/base/units.ts";
import { TrackedDma } from "../../src/driver/dma.ts";
import { DmaMapFailed } from "../../src/driver/dma-api.ts";
import { CpuThread } from "../../src/machine/embedded/cpu.ts";

export const IDLE = 200;
/** Frames that it tries to have, and the first of them: other memory than its rings are in. */
const WANTED = 4096;
const FIRST = 4096;

function hoard(dma: TrackedDma): void {
  const frame = (n: number) => ((FIRST + n) * FRAME_SIZE) as Gpa;
  for (let n = 0; n < IDLE; n++)
    dma.unmapSingle(dma.mapSingle(frame(n), FRAME_SIZE, "bidirectional"), FRAME_SIZE, "bidirectional");
  for (let n = IDLE; n < IDLE + WANTED; n++)
    try {
      dma.mapSingle(frame(n), FRAME_SIZE, "bidirectional");
    } catch (error) {
      if (!(error instanceof DmaMapFailed)) throw error;
    }
}

if (workerData) {
  const { allocCoherent } = TrackedDma.prototype;
  let rings = 0;
  TrackedDma.prototype.allocCoherent = function (length) {
    const ring = allocCoherent.call(this, length);
    // Both rings of its queue are there.
    if (++rings === 2) hoard(this);
    return ring;
  };
  new CpuThread(workerData).run();
}
