/** A guest's CPU in a process of its own: maps and unmaps with the driver's TrackingUnits. guest.c is its twin in C. */
import { TrackingUnits } from "../../src/driver/units.ts";
import { GuestMemory } from "../../src/memory/guest-memory.ts";
import { random } from "../support/random.ts";
import {
  ANSWERED,
  ASKED,
  DONE,
  FIRST,
  FRAMES,
  FRAMES_PER_MAP_MAX,
  GONE,
  type GuestTotals,
  heldWord,
  IDLE,
  inheritedRam,
  MAPPINGS,
  mailbox,
  meet,
  type Orders,
  READY,
  rest,
} from "./arena.ts";

/** Broken: counts as a V8 would whose Atomics on an ArrayBuffer were not atomic between processes. */
class PlainMemory extends GuestMemory {
  override add32(gpa: number, value: number): number {
    const seen = this.load32(gpa);
    this.store32(gpa, seen + value);
    return seen;
  }
  override compareExchange32(gpa: number, expected: number, replacement: number): number {
    const seen = this.load32(gpa);
    if (seen === expected) this.store32(gpa, replacement);
    return seen;
  }
}

const orders: Orders = JSON.parse(process.argv[2]!);
const memory = new (orders.twin === "plain-counting" ? PlainMemory : GuestMemory)([inheritedRam()]);
const units = new TrackingUnits(memory, orders.geometry, orders.processes);
const box = mailbox(orders.id);
const next = random(orders.seed);
const totals = { mapped: 0, unmapped: 0, asked: 0, lost: 0, failed: 0 } satisfies GuestTotals;

/** A live mapping: what the word of each of its frames said when the device was given the address. */
class Mapping {
  gfn = 0;
  frames = 0;
  readonly held = new Int32Array(FRAMES_PER_MAP_MAX);

  map(): void {
    this.gfn = FIRST + next(FRAMES - FRAMES_PER_MAP_MAX);
    this.frames = 1 + next(FRAMES_PER_MAP_MAX);
    const counted = units.get(this.gfn, this.frames);
    if (counted === "no-unit" || counted === "saturated") {
      totals.failed++;
      this.frames = 0;
      return;
    }
    totals.mapped += this.frames;
    if (counted === "ask" && !ask(this.gfn, this.frames)) totals.failed++;
    for (let i = 0; i < this.frames; i++) {
      this.held[i] = memory.load32(heldWord(this.gfn + i));
      if (this.held[i]! % 2 === 0) totals.lost++;
    }
  }

  unmap(): void {
    for (let i = 0; i < this.frames; i++)
      if (memory.load32(heldWord(this.gfn + i)) !== this.held[i]) totals.lost++;
    totals.unmapped += units.put(this.gfn, this.frames);
    this.frames = 0;
  }
}

/** A PIN request. True when every frame was seen pinned after it. */
function ask(gfn: number, frames: number): boolean {
  totals.asked++;
  memory.store32(box.gfn, gfn);
  memory.store32(box.frames, frames);
  memory.store32(box.state, ASKED);
  while (memory.load32(box.state) !== ANSWERED) rest();
  memory.store32(box.state, IDLE);
  for (let i = 0; i < frames; i++) if (!units.pinned(gfn + i)) return false;
  return memory.load32(box.status) === 0;
}

const mappings = Array.from({ length: MAPPINGS }, () => new Mapping());
meet(memory, READY, orders.processes);
for (let n = 0; n < orders.maps || memory.load32(DONE) < orders.processes; n++) {
  if (n === orders.maps) memory.add32(DONE, 1);
  const mapping = mappings[n % MAPPINGS]!;
  mapping.unmap();
  mapping.map();
}
for (const mapping of mappings) mapping.unmap();
memory.add32(GONE, 1);
console.log(JSON.stringify(totals));
