/**
 * Map and unmap of a pinned frame: the driver's TrackingUnits against the kernel module's units.c, on one table in
 * memory that is mmapped as a guest's RAM is. `atomics` is what V8 leaves to gain: the same two atomic operations and
 * the load between them on words known beforehand, without a look-up of frame, table or region.
 */
import koffi from "koffi";
import { FRAME_SIZE, type Gfn, type Gpa } from "../src/base/units.ts";
import { buildTable, type TableGeometry } from "../src/driver/table.ts";
import { TrackingUnits } from "../src/driver/units.ts";
import { monotonicClock } from "../src/host/clock.ts";
import { createMemfd, FdMapper } from "../src/host/mapping.ts";
import { GuestMemory } from "../src/memory/guest-memory.ts";
import { DmaTrackingTable, NO_UNIT, type Unit } from "../src/tracking/dtt.ts";
import { random } from "../test/support/random.ts";
import { compare, type Series } from "./compare.ts";
import { NativeBinary } from "./native/build.ts";

const CPUS = 4;
/** Needs 3 levels. Sparse: only the table's pages are ever touched. */
const RAM = 4 * 2 ** 30;
/** What the mappings lie in: 426 MiB, units of 426 KiB in 107 leaves. */
const FRAMES = 109_051;
const FIRST = 2 ** 18; // a leaf boundary

const CASES = [
  { what: "64 frames, in cache", frames: 64, perMap: 1 },
  { what: "109,051 frames", frames: FRAMES, perMap: 1 },
  { what: "109,051 frames, 2 per map", frames: FRAMES, perMap: 2 },
  { what: "109,051 frames, 8 per map", frames: FRAMES, perMap: 8 },
] as const;
/** Frames counted up and down in one measurement: some 10 ms, which is often enough left alone. */
const WORK = 400_000;

export interface HotPathCase {
  readonly what: string;
  readonly frames: number;
  readonly perMap: number;
  /** Nanoseconds per frame that is mapped and unmapped. */
  readonly series: Readonly<Record<"c" | "atomics" | "typescript", Series>>;
}

export async function hotPath(rounds: number, say: (text: string) => void): Promise<HotPathCase[]> {
  using native = await NativeBinary.build(new URL("native/hot-path.c", import.meta.url), "library", say);
  const mapper = new FdMapper();
  try {
    const { hostAddress, bytes } = mapper.map(createMemfd("coiommu-bench", RAM), 0, RAM);
    const memory = new GuestMemory([{ gpa: 0 as Gpa, size: RAM, hostAddress, bytes }]);
    const { geometry, unitOf } = pinnedTable(memory);
    const c = nativeCounting(native.path, hostAddress, geometry);
    const units = new TrackingUnits(memory, geometry, CPUS);
    const words = new Int32Array(bytes.buffer, bytes.byteOffset, RAM / 4);
    return CASES.map(({ what, frames, perMap }) => {
      const gfns = shuffled(FIRST, frames - perMap + 1);
      const gfns64 = BigUint64Array.from(gfns, BigInt);
      const indices = Int32Array.from(gfns, (gfn) => unitOf(gfn) / 4);
      const loops = Math.ceil(WORK / perMap / gfns.length);
      const work = loops * gfns.length * perMap;
      const series = compare(rounds, {
        c: () => c(gfns64, perMap, loops) / work,
        atomics: () => bareAtomics(words, indices, perMap, loops) / work,
        typescript: () => count(units, gfns, perMap, loops) / work,
      });
      return { what, frames, perMap, series };
    });
  } finally {
    mapper.close();
  }
}

/** A table for all of RAM, with P set in the units that are mapped. */
function pinnedTable(memory: GuestMemory) {
  let used = 0;
  const geometry = buildTable(memory, {
    allocate(frames) {
      used += frames;
      return ((used - frames) * FRAME_SIZE) as Gpa;
    },
    free() {},
  });
  const table = new DmaTrackingTable(memory, geometry.root, geometry.levels);
  const unitOf = (gfn: number): Unit => {
    const unit = table.walk(gfn as Gfn);
    if (unit === NO_UNIT) throw new Error(`frame ${gfn} has no unit`);
    return unit;
  };
  for (let gfn = FIRST; gfn < FIRST + FRAMES; gfn++) table.setPinned(unitOf(gfn));
  return { geometry, unitOf };
}

function shuffled(first: number, count: number): Float64Array {
  const next = random(count);
  const gfns = Float64Array.from({ length: count }, (_, i) => first + i);
  for (let i = count - 1; i > 0; i--) {
    const j = next(i + 1);
    [gfns[i], gfns[j]] = [gfns[j]!, gfns[i]!];
  }
  return gfns;
}

/** hot_path() of native/hot-path.c; nanoseconds. */
function nativeCounting(path: string, ram: number, { root, levels }: TableGeometry) {
  const library = koffi.load(path);
  library.func("void hot_path_table(int64_t, uint64_t, uint, uint)")(ram, root, levels, CPUS);
  const run = library.func("double hot_path(void *, uint, uint64_t, uint)");
  return (gfns: BigUint64Array, perMap: number, loops: number): number => {
    const ns: number = run(gfns, gfns.length, perMap, loops);
    if (ns < 0) throw new Error("units.c did not count every frame, or found one that is not pinned");
    return ns;
  };
}

/** The same loop; nanoseconds. */
function count(units: TrackingUnits, gfns: Float64Array, perMap: number, loops: number): number {
  const start = monotonicClock.now();
  let unmapped = 0;
  let pinned = true;
  for (let loop = 0; loop < loops; loop++)
    for (let i = 0; i < gfns.length; i++) {
      if (units.get(gfns[i]!, perMap) !== "pinned") pinned = false;
      unmapped += units.put(gfns[i]!, perMap);
    }
  if (!pinned || unmapped !== perMap * gfns.length * loops)
    throw new Error("units.ts did not count every frame, or found one that is not pinned");
  return monotonicClock.now() - start;
}

function bareAtomics(words: Int32Array, indices: Int32Array, perMap: number, loops: number): number {
  const start = monotonicClock.now();
  let lost = 0;
  for (let loop = 0; loop < loops; loop++)
    for (let i = 0; i < indices.length; i++) {
      const first = indices[i]!;
      for (let at = first; at < first + perMap; at++) Atomics.add(words, at, 1);
      for (let at = first; at < first + perMap; at++) {
        const seen = words[at]!;
        if (Atomics.compareExchange(words, at, seen, seen - 1) !== seen) lost++;
      }
    }
  if (lost > 0) throw new Error("somebody else counts in this table");
  return monotonicClock.now() - start;
}
