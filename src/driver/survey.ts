import { FRAME_SIZE } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import { TU_COUNT, TU_PINNED } from "../wire/dtt.ts";
import { NO_UNIT, type TrackingUnits } from "./units.ts";

/** Visit the unit of every frame of RAM that the table has one for: its GFN and the unit's GPA. */
export function eachUnit(
  memory: GuestMemory,
  units: TrackingUnits,
  visit: (gfn: number, unit: number) => void,
): void {
  for (const r of memory.regions) {
    for (let gfn = r.gpa / FRAME_SIZE; gfn < (r.gpa + r.size) / FRAME_SIZE; gfn++) {
      const unit = units.find(gfn);
      if (unit !== NO_UNIT) visit(gfn, unit);
    }
  }
}

/** What the guest's own look at its table finds. */
export interface TableUse {
  /** Frames with COUNT above 0, and the sum of all COUNTs. */
  readonly liveFrames: number;
  readonly liveRefs: number;
  readonly pinnedFrames: number;
}

/** A moving picture: mappings come and go during the walk. */
export function surveyTable(memory: GuestMemory, units: TrackingUnits): TableUse {
  const use = { liveFrames: 0, liveRefs: 0, pinnedFrames: 0 };
  eachUnit(memory, units, (_, unit) => {
    const word = memory.load32(unit);
    if (word & TU_COUNT) use.liveFrames++;
    use.liveRefs += word & TU_COUNT;
    if (word & TU_PINNED) use.pinnedFrames++;
  });
  return use;
}
