/** The driver does what the case table says, as guest/linux does (test/vm/driver-cases.test.ts); broken ones do not. */
import assert from "node:assert/strict";
import test from "node:test";
import { DriverInTypeScript, type Parts } from "../../test/support/driver-in-typescript.ts";
import { firstDifference } from "../../test/support/run-driver-case.ts";
import { CASES } from "../../test/vectors/driver-cases.ts";
import type { Bdf } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import { TU_WRITABLE } from "../wire/dtt.ts";
import type { FrameRange } from "./pin-batches.ts";
import { PinRequests, type PinRequestsOptions } from "./pin-requests.ts";
import { NO_UNIT, TrackingUnits } from "./units.ts";

for (const tested of CASES)
  test(`driver case: ${tested.name}`, async () =>
    assert.equal(await firstDifference(new DriverInTypeScript(), tested), undefined));

class NeverUncounts extends TrackingUnits {
  override put(_gfn: number, nr: number): number {
    return nr;
  }
}
class KeepsNoRoomForCpus extends TrackingUnits {
  constructor(...[memory, table, , marksDirty]: ConstructorParameters<typeof TrackingUnits>) {
    super(memory, table, 0, marksDirty);
  }
}
class MarksAlways extends TrackingUnits {
  constructor(...[memory, table, cpus]: ConstructorParameters<typeof TrackingUnits>) {
    super(memory, table, cpus, true);
  }
}
class MarksNever extends TrackingUnits {
  constructor(...[memory, table, cpus]: ConstructorParameters<typeof TrackingUnits>) {
    super(memory, table, cpus, false);
  }
}
class TakesAllForWritable extends TrackingUnits {
  override get(gfn: number, nr: number) {
    return super.get(gfn, nr);
  }
}
class TakesAllForWritten extends TrackingUnits {
  override put(gfn: number, nr: number) {
    return super.put(gfn, nr);
  }
}
class TakesNoneForWritten extends TrackingUnits {
  override put(gfn: number, nr: number) {
    return super.put(gfn, nr, false);
  }
}
/** Leaves W to the next map. */
class LeavesW extends TrackingUnits {
  readonly #memory: GuestMemory;
  constructor(...args: ConstructorParameters<typeof TrackingUnits>) {
    super(...args);
    this.#memory = args[0];
  }
  override put(gfn: number, nr: number, written?: boolean) {
    const units = Array.from({ length: nr }, (_, i) => this.find(gfn + i)).filter((unit) => unit !== NO_UNIT);
    const had = units.filter((unit) => this.#memory.load32(unit) & TU_WRITABLE);
    const done = super.put(gfn, nr, written);
    for (const unit of had) this.#memory.or32(unit, TU_WRITABLE);
    return done;
  }
}
class CountsWhatIsPinned extends TrackingUnits {
  override get(gfn: number, nr: number, write?: boolean) {
    return this.pinned(gfn) ? super.get(gfn, nr, write) : "ask";
  }
}
class CountsWhenAnswered extends PinRequests {
  readonly #units: TrackingUnits;
  constructor(options: PinRequestsOptions) {
    super(options);
    this.#units = options.units;
  }
  override pin(endpoint: Bdf, ranges: Iterable<FrameRange>): void {
    super.pin(endpoint, ranges);
    for (const [gfn, nr] of ranges) TrackingUnits.prototype.get.call(this.#units, gfn, nr);
  }
}
class AsksFrameByFrame extends PinRequests {
  override pin(endpoint: Bdf, ranges: Iterable<FrameRange>): void {
    for (const [first, nr] of ranges)
      for (let gfn = first; gfn < first + nr; gfn++) super.pin(endpoint, [[gfn, 1]]);
  }
}
class IgnoresTheBatchLimit extends PinRequests {
  constructor(options: PinRequestsOptions) {
    super({ ...options, rangesMax: 99 });
  }
}
class ForgetsLost extends PinRequests {
  override pin(endpoint: Bdf, ranges: Iterable<FrameRange>): void {
    this.forgetLost();
    super.pin(endpoint, ranges);
  }
}

const TWINS: Readonly<Record<string, Partial<Parts>>> = {
  "never counts down": { Units: NeverUncounts },
  "keeps no room in COUNT for other CPUs": { Units: KeepsNoRoomForCpus },
  "sets W without PIN_DIRTY": { Units: MarksAlways },
  "sets no W with PIN_DIRTY": { Units: MarksNever },
  "sets W where the device only reads": { Units: TakesAllForWritable },
  "sets D where the device only reads, or was told nothing": { Units: TakesAllForWritten },
  "sets no D": { Units: TakesNoneForWritten },
  "leaves W without a mapping": { Units: LeavesW },
  "asks before it counts": { Units: CountsWhatIsPinned, Requests: CountsWhenAnswered },
  "asks frame by frame": { Requests: AsksFrameByFrame },
  "asks for more ranges than the device takes": { Requests: IgnoresTheBatchLimit },
  "asks while a request is lost": { Requests: ForgetsLost },
};
for (const [what, parts] of Object.entries(TWINS))
  test(`the case table finds a driver that ${what}`, async (t) => {
    const driver = new DriverInTypeScript({ Units: TrackingUnits, Requests: PinRequests, ...parts });
    const all = await Promise.all(CASES.map((tested) => firstDifference(driver, tested)));
    const first = all.find((difference) => difference !== undefined);
    assert.ok(first);
    t.diagnostic(first);
  });
