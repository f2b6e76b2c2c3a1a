import { FRAME_SIZE, type Gfn, type Gpa } from "../base/units.ts";
import { FramePool } from "../driver/pages.ts";
import { buildTable } from "../driver/table.ts";
import { TrackingUnits } from "../driver/units.ts";
import { GuestMemory } from "../memory/guest-memory.ts";

/** The memory of a guest whose `ramFrames` are nobody's, with its table behind them, and the units that a driver counts in. */
export function bareGuest(ramFrames: number) {
  const tableFrames = Math.ceil(ramFrames / 1024) + 8;
  const frames = ramFrames + tableFrames;
  const bytes = new Uint8Array(new SharedArrayBuffer(frames * FRAME_SIZE));
  const memory = new GuestMemory([
    { gpa: 0 as Gpa, size: bytes.length, hostAddress: 0, presentAddress: 0, bytes },
  ]);
  const table = buildTable(memory, new FramePool(memory, ramFrames as Gfn, tableFrames));
  return { memory, frames, table, units: new TrackingUnits(memory, table, 1) };
}
