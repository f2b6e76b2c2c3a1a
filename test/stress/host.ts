/** The backend in a process of its own: the production Tracker over a pinner that says in shared memory what it holds. */
import { type Gpa, milliseconds, type Nanoseconds } from "../../src/base/units.ts";
import { monotonicClock } from "../../src/host/clock.ts";
import { counters, countersBuffer } from "../../src/memory/counters.ts";
import { GuestMemory } from "../../src/memory/guest-memory.ts";
import { createPolicy } from "../../src/policy/registry.ts";
import { DmaTrackingTable, type Unit } from "../../src/tracking/dtt.ts";
import type { Pinner } from "../../src/tracking/pinner.ts";
import { createIommuBuffer, SoftwareIommu } from "../../src/tracking/software-iommu.ts";
import { TRACKING_COUNTERS, Tracker } from "../../src/tracking/tracker.ts";
import { TU_PINNED } from "../../src/wire/dtt.ts";
import {
  ANSWERED,
  ASKED,
  DONE,
  GONE,
  type HostTotals,
  heldWord,
  inheritedRam,
  mailbox,
  meet,
  type Orders,
  RAM,
  READY,
  rest,
} from "./arena.ts";

const orders: Orders = JSON.parse(process.argv[2]!);
/** What only counts pins finds a page at one address. */
const region = (({ hostAddress, ...others }) => ({ hostAddress, presentAddress: hostAddress, ...others }))(
  inheritedRam(),
);
const memory = new GuestMemory();

/** By handle, the frames of a pin. */
const pins = new Map<number, readonly number[]>();
let nextHandle = 0;
/** Two while an extent is split. */
const PINS_MAX = 2;
const pinsOf = new Int32Array(RAM / 4096);
const pinner: Pinner = {
  name: "shared words",
  kernelSource: "none",
  pin(addresses, count, handles, pages) {
    for (let i = 0; i < count; i++) {
      const first = (addresses[i]! - region.hostAddress) / 4096;
      const frames = Array.from({ length: pages?.[i] ?? 1 }, (_, page) => first + page);
      handles[i] = nextHandle++;
      pins.set(handles[i]!, frames);
      for (const gfn of frames)
        if (++pinsOf[gfn]! === 1) memory.add32(heldWord(gfn), 1);
        else if (pinsOf[gfn]! > PINS_MAX) throw new Error(`frame ${gfn} is pinned ${pinsOf[gfn]} times`);
    }
  },
  pinExtent() {
    throw new Error("nothing is pinned statically here");
  },
  release(handles, count) {
    for (const handle of handles.subarray(0, count)) {
      const frames = pins.get(handle);
      if (!pins.delete(handle)) throw new Error(`handle ${handle} is released twice`);
      for (const gfn of frames!) if (--pinsOf[gfn]! === 0) memory.add32(heldWord(gfn), 1);
    }
    return count;
  },
  discarded: (_addresses, count, out) => void out.fill(0, 0, count),
  kernelPinnedPages: () => null,
  close() {},
};

/** Broken: load and store instead of one CAS, microseconds apart. */
class TornTable extends DmaTrackingTable {
  override claimForUnpin(unit: Unit): ReturnType<DmaTrackingTable["claimForUnpin"]> {
    if (memory.load32(unit) >>> 0 !== TU_PINNED) return super.claimForUnpin(unit);
    for (let i = 0; i < 200; i++) memory.load32(unit);
    memory.store32(unit, 0);
    return "claimed";
  }
}

const count = counters(TRACKING_COUNTERS, countersBuffer(TRACKING_COUNTERS));
const tracker = new Tracker({
  memory,
  pinner,
  iommu: new SoftwareIommu(createIommuBuffer(RAM / 4096), monotonicClock),
  policy: createPolicy("lru"),
  clock: monotonicClock,
  counters: count,
  quota: Number.POSITIVE_INFINITY,
  beforeActivation: "none",
  openTable: (m: GuestMemory, root: Gpa, levels: number) =>
    new (orders.twin === "torn-unpin" ? TornTable : DmaTrackingTable)(m, root, levels),
});
tracker.setMemory([region]);
if (!tracker.activate(orders.geometry.root, orders.geometry.levels, true)) throw new Error("bad table");

function serve(): boolean {
  let served = false;
  for (let guest = 0; guest < orders.guests; guest++) {
    const box = mailbox(guest);
    if (memory.load32(box.state) !== ASKED) continue;
    const status = tracker.pin([{ gfn: memory.load32(box.gfn), nrFrames: memory.load32(box.frames) }]);
    memory.store32(box.status, status);
    memory.store32(box.state, ANSWERED);
    served = true;
  }
  return served;
}

meet(memory, READY, orders.processes);
let next = monotonicClock.now();
let done = false;
while (memory.load32(GONE) < orders.guests) {
  if (!done && count.framesUnpinned >= orders.unpins) {
    memory.add32(DONE, 1);
    done = true;
  }
  if (tracker.slice() || serve()) continue;
  rest();
  if (monotonicClock.now() < next) continue;
  next = (monotonicClock.now() + milliseconds(orders.pauseMs)) as Nanoseconds;
  tracker.startPass();
}
const totals: HostTotals = {
  pinned: count.framesPinned,
  unpinned: count.framesUnpinned,
  passes: count.passes,
};
console.log(JSON.stringify(totals));
