import assert from "node:assert/strict";
import test from "node:test";
import { ramRegion } from "../../test/support/guest.ts";
import { random } from "../../test/support/random.ts";
import { FRAME_SIZE, type Gfn, type Gpa } from "../base/units.ts";
import { GuestMemory } from "../memory/guest-memory.ts";
import { DmaTrackingTable, NO_UNIT } from "../tracking/dtt.ts";
import { TU_ACCESSED as A, TU_COUNT as COUNT, TU_PINNED as P } from "../wire/dtt.ts";
import { buildTable } from "./table.ts";
import { type Counted, TrackingUnits } from "./units.ts";

/** RAM of four leaves, and of two that begin within a leaf, at GFNs whose low 32 bits are those of other RAM. */
const LOW_FRAMES = 4096;
const HIGH = 2 ** 33 + 512;
const HIGH_FRAMES = 1024;
const TABLE = 2048;
const CPUS = 3;
const COUNT_MAX = COUNT - CPUS;

/** Around every edge: of RAM, of a leaf, of what the table can index. */
const CENTERS = [3, 1024, LOW_FRAMES, HIGH, HIGH + 512, HIGH + HIGH_FRAMES, 2 ** 37, 2 ** 40 - 2];

function guest(makeMemory: () => GuestMemory = () => new GuestMemory()) {
  const memory = makeMemory();
  memory.setRegions([ramRegion(0, LOW_FRAMES), ramRegion(HIGH * FRAME_SIZE, HIGH_FRAMES)]);
  let next = TABLE;
  const geometry = buildTable(memory, {
    allocate: (frames) => {
      next += frames;
      return ((next - frames) * FRAME_SIZE) as Gpa;
    },
    free: () => {},
  });
  const table = new DmaTrackingTable(memory, geometry.root, geometry.levels);
  return { memory, geometry, unitOf: (gfn: number) => table.walk(gfn as Gfn) };
}
type Guest = ReturnType<typeof guest>;
type Units = Pick<TrackingUnits, "get" | "put" | "pinned">;

/** What TrackingUnits must do, with words in a Map and one frame after the other. */
class Model implements Units {
  readonly words = new Map<number, number>();
  readonly #exists: (gfn: number) => boolean;
  constructor(exists: (gfn: number) => boolean) {
    this.#exists = exists;
  }
  word(gfn: number): number {
    return this.words.get(gfn) ?? 0;
  }
  get(gfn: number, nr: number): Counted {
    let asking = false;
    for (let at = gfn; at < gfn + nr; at++) {
      const failure = !this.#exists(at) ? "no-unit" : (this.word(at) & COUNT) >= COUNT_MAX ? "saturated" : "";
      if (failure) {
        this.put(gfn, at - gfn);
        return failure;
      }
      asking ||= (this.word(at) & P) === 0;
      this.words.set(at, ((this.word(at) + 1) | A) >>> 0);
    }
    return asking ? "ask" : "pinned";
  }
  put(gfn: number, nr: number): number {
    let done = 0;
    for (let at = gfn; at < gfn + nr; at++) {
      if (!this.#exists(at) || (this.word(at) & COUNT) === 0) continue;
      this.words.set(at, this.word(at) - 1);
      done++;
    }
    return done;
  }
  pinned(gfn: number): boolean {
    return this.#exists(gfn) && (this.word(gfn) & P) !== 0;
  }
}

/** Play `steps` random operations on `units` and on the model; the first difference. */
function difference(
  { memory, unitOf }: Guest,
  units: Units,
  seed: number,
  steps: number,
): string | undefined {
  const next = random(seed);
  const model = new Model((gfn) => unitOf(gfn) !== NO_UNIT);
  for (let step = 0; step < steps; step++) {
    const gfn = CENTERS[next(CENTERS.length)]! - next(4) + next(4);
    const nr = next(6);
    const at = `seed ${seed}, step ${step}, ${nr} frames from ${gfn}`;
    const action = next(8);
    if (action < 3) {
      if (units.get(gfn, nr) !== model.get(gfn, nr)) return `${at}: get`;
    } else if (action < 6) {
      if (units.put(gfn, nr) !== model.put(gfn, nr)) return `${at}: put`;
    } else if (units.pinned(gfn) !== model.pinned(gfn)) return `${at}: pinned`;
    else if (unitOf(gfn) !== NO_UNIT) {
      // The host pins, unpins and ages; and now and then a frame is about to have too many mappings.
      const count = next(4) === 0 ? COUNT_MAX - next(3) : model.word(gfn) & COUNT;
      const word = ([0, P, A, P | A][next(4)]! | count) >>> 0;
      memory.store32(unitOf(gfn), word | 0);
      model.words.set(gfn, word);
    }
    for (const [frame, word] of model.words)
      if (memory.load32(unitOf(frame)) >>> 0 !== word) return `${at}: the word of frame ${frame}`;
  }
  return undefined;
}

const unitsOf = ({ memory, geometry }: Guest, cpus = CPUS) => new TrackingUnits(memory, geometry, cpus);

for (let seed = 1; seed <= 10; seed++)
  test(`units count as a plain model does, over 3,000 random operations (seed ${seed})`, () => {
    const g = guest();
    assert.equal(difference(g, unitsOf(g), seed, 3000), undefined);
  });

const twins: Record<string, (g: Guest) => Units> = {
  "an unmap that borrows from the flags": (g) => {
    const units = unitsOf(g);
    return {
      get: (gfn, nr) => units.get(gfn, nr),
      pinned: (gfn) => units.pinned(gfn),
      put(gfn, nr) {
        for (let at = gfn; at < gfn + nr; at++)
          if (g.unitOf(at) !== NO_UNIT) g.memory.add32(g.unitOf(at), -1);
        return nr;
      },
    };
  },
  "a failure that leaves the frames before it counted": (g) => {
    const units = unitsOf(g);
    return {
      put: (gfn, nr) => units.put(gfn, nr),
      pinned: (gfn) => units.pinned(gfn),
      get(gfn, nr) {
        let worst: Counted = "pinned";
        for (let at = gfn; at < gfn + nr; at++) {
          const found = units.get(at, 1);
          if (found === "no-unit" || found === "saturated") return found;
          if (found === "ask") worst = found;
        }
        return worst;
      },
    };
  },
  "GFNs cut to 32 bits": (g) => {
    const units = unitsOf(g);
    return {
      get: (gfn, nr) => units.get(gfn >>> 0, nr),
      put: (gfn, nr) => units.put(gfn >>> 0, nr),
      pinned: (gfn) => units.pinned(gfn >>> 0),
    };
  },
  "a limit of COUNT that forgets a CPU": (g) => unitsOf(g, CPUS - 1),
};
for (const [what, twin] of Object.entries(twins))
  test(`broken twin is caught: ${what}`, () => {
    const g = guest();
    assert.ok(difference(g, twin(g), 1, 3000));
  });

// --- what a sequence of operations cannot show ----------------------------------------------------------------------

/** Runs a CPU of its own before one compare-and-swap. */
class OtherCpu extends GuestMemory {
  before: () => void = () => {};
  override compareExchange32(gpa: number, expected: number, replacement: number): number {
    const other = this.before;
    this.before = () => {};
    other();
    return super.compareExchange32(gpa, expected, replacement);
  }
}

for (const [what, other, done, word] of [
  ["maps the frame", (u: TrackingUnits) => u.get(5, 1), 1, A + 1],
  ["unmaps the last mapping", (u: TrackingUnits) => u.put(5, 1), 0, A],
] as const)
  test(`an unmap starts again when another CPU ${what} meanwhile`, () => {
    const memory = new OtherCpu();
    const g = guest(() => memory);
    const units = unitsOf(g);
    units.get(5, 1);
    memory.before = () => other(units);
    assert.equal(units.put(5, 1), done);
    assert.equal(memory.load32(g.unitOf(5)), word);
  });

test("a map that finds A set is one operation per frame, and an unmap two", () => {
  const seen: string[] = [];
  class Counting extends GuestMemory {
    override load32(gpa: number): number {
      seen.push("load");
      return super.load32(gpa);
    }
    override peek32(gpa: number): number {
      seen.push("peek");
      return super.peek32(gpa);
    }
    override add32(gpa: number, value: number): number {
      seen.push("add");
      return super.add32(gpa, value);
    }
    override or32(gpa: number, bits: number): number {
      seen.push("or");
      return super.or32(gpa, bits);
    }
    override compareExchange32(gpa: number, expected: number, replacement: number): number {
      seen.push("cas");
      return super.compareExchange32(gpa, expected, replacement);
    }
  }
  const units = unitsOf(guest(() => new Counting()));
  units.get(1022, 4);
  seen.length = 0;
  units.get(1022, 4);
  units.put(1022, 4);
  assert.equal(seen.join(" "), "add add add add peek cas peek cas peek cas peek cas");
});
