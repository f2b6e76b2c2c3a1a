/** The driver does what the case table says, as guest/linux does (test/vm/driver-cases.test.ts); broken ones do not. */
import assert from "node:assert/strict";
import test from "node:test";
import { DriverInTypeScript, type Parts } from "../../test/support/driver-in-typescript.ts";
import { firstDifference } from "../../test/support/run-driver-case.ts";
import { CASES } from "../../test/vectors/driver-cases.ts";
import type { Bdf } from "../base/units.ts";
import { type FrameRange, PinRequests, type PinRequestsOptions } from "./pin-requests.ts";
import { TrackingUnits } from "./units.ts";

for (const tested of CASES)
  test(`driver case: ${tested.name}`, async () =>
    assert.equal(await firstDifference(new DriverInTypeScript(), tested), undefined));

class NeverUncounts extends TrackingUnits {
  override put(_gfn: number, nr: number): number {
    return nr;
  }
}
class KeepsNoRoomForCpus extends TrackingUnits {
  constructor(...[memory, table]: ConstructorParameters<typeof TrackingUnits>) {
    super(memory, table, 0);
  }
}
class CountsWhatIsPinned extends TrackingUnits {
  override get(gfn: number, nr: number) {
    return this.pinned(gfn) ? super.get(gfn, nr) : "ask";
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
