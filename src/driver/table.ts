import { FRAME_SIZE, type Gpa } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import {
  ENTRY_PRESENT,
  entryOffset,
  entryTarget,
  gfnCapacity,
  LEAF_BITS,
  levelsFor,
  TABLE_SIZE,
} from "../wire/dtt.ts";
import { DmaMapFailed, type PageAllocator } from "./dma-api.ts";

/** Where a DMA Tracking Table is: what the driver tells the device. docs/abi.md section 1. */
export interface TableGeometry {
  readonly root: Gpa;
  readonly levels: number;
}

const LEAF_FRAMES = 2 ** LEAF_BITS;

/**
 * Build a table with a zeroed leaf for every frame of guest RAM: maps run where nothing can be allocated any more.
 * Costs 0.1 % of RAM. Called once, before any CPU maps. Throws DmaMapFailed "no-memory".
 */
export function buildTable(memory: GuestMemory, pages: PageAllocator): TableGeometry {
  const allocate = (): Gpa => {
    const page = pages.allocate(TABLE_SIZE / FRAME_SIZE);
    if (page === undefined) throw new DmaMapFailed("no-memory");
    return page;
  };
  const last = Math.max(...memory.regions.map((r) => (r.gpa + r.size) / FRAME_SIZE - 1));
  const levels = levelsFor(last);
  const root = allocate();
  for (const r of memory.regions) {
    const first = r.gpa / FRAME_SIZE;
    for (
      let gfn = first - (first % LEAF_FRAMES);
      gfn < Math.min((r.gpa + r.size) / FRAME_SIZE, gfnCapacity(levels));
      gfn += LEAF_FRAMES
    )
      makeLeaf(memory, { root, levels }, gfn, allocate);
  }
  return { root, levels };
}

function makeLeaf(memory: GuestMemory, { root, levels }: TableGeometry, gfn: number, allocate: () => Gpa) {
  let table: number = root;
  for (let level = levels; level > 1; level--) {
    const at = table + entryOffset(gfn, level);
    let next = entryTarget(memory.load32(at), memory.load32(at + 4));
    if (next === undefined) {
      next = allocate();
      // ORDERING: the half with PRESENT last, as a release. PAIRS WITH the host's acquire loads in its walk.
      memory.store32(at + 4, Math.floor(next / 2 ** 32));
      memory.store32(at, (next % 2 ** 32) | ENTRY_PRESENT);
    }
    table = next;
  }
}
