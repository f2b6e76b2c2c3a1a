import type { Clock } from "../../src/base/clock.ts";
import type { Gpa } from "../../src/base/units.ts";
import { TrackingUnits } from "../../src/driver/units.ts";
import type { GuestMemory } from "../../src/memory/guest-memory.ts";
import type { UnpinPolicy } from "../../src/policy/policy.ts";
import { createPolicy } from "../../src/policy/registry.ts";
import { CheckedTracker } from "../../src/sim/backend.ts";
import { FakeHost, frameAt } from "../../src/sim/fake-host.ts";
import type { Settings } from "../../src/sim/settings.ts";
import type { Twin } from "../../src/sim/world.ts";
import { DmaTrackingTable, NO_UNIT, type Unit } from "../../src/tracking/dtt.ts";
import { SoftwareIommu } from "../../src/tracking/software-iommu.ts";
import type { TrackingCounters } from "../../src/tracking/tracker.ts";
import { TU_COUNT, TU_DIRTY, TU_PINNED, TU_WRITABLE } from "../../src/wire/dtt.ts";
import { claimTwins } from "./twins-of-claims.ts";
import { domainTwins } from "./twins-of-domains.ts";
import { faultTwins } from "./twins-of-faults.ts";
import { BALLOONS, hostTwins } from "./twins-of-hosts.ts";
import { speculationTwins } from "./twins-of-speculation.ts";

/** A protocol broken in one place, and what a checker says of it. */
export interface BrokenTwin {
  readonly twin: Twin | (() => Twin);
  readonly found: RegExp;
  /** Of the worlds in which it shows soon. */
  readonly settings?: Partial<Settings>;
  /** Steps in which it shows for sure, where those that others need are too few. */
  readonly stepsMax?: number;
}

const P = TU_PINNED | 0;
const UNHARVESTED = /before a harvest, which does not give it/;
const GIVEN_AWAY = /hits a page that the guest has given away/;
const LOST_COUNT = /COUNT 0|unpinned while it is mapped|idle and stay pinned|before a harvest/;
const LOST = /unpinned while it is mapped|DMA to (frame|GPA)|DMA fault|the host does not hold it|COUNT 0/;

class OpenTable extends DmaTrackingTable {
  readonly memory: GuestMemory;
  constructor(memory: GuestMemory, root: Gpa, levels: number) {
    super(memory, root, levels);
    this.memory = memory;
  }
}

class TornTable extends OpenTable {
  override claimForUnpin(unit: Unit): ReturnType<DmaTrackingTable["claimForUnpin"]> {
    const seen = this.memory.load32(unit);
    if (!(seen & P)) return "not-pinned";
    if (seen !== P) return super.claimForUnpin(unit);
    this.memory.store32(unit, 0);
    return "claimed";
  }
}

class CountlessTable extends OpenTable {
  override claimForUnpin(unit: Unit): ReturnType<DmaTrackingTable["claimForUnpin"]> {
    const seen = this.memory.load32(unit);
    if (!(seen & P)) return "not-pinned";
    return this.memory.compareExchange32(unit, seen, seen & ~P) === seen ? "claimed" : "mapped";
  }
}

/** Takes what has no P for unused, whatever its COUNT. */
class ForgetfulTable extends OpenTable {
  override claimForUnpin(unit: Unit): ReturnType<DmaTrackingTable["claimForUnpin"]> {
    return this.load(unit) & TU_PINNED ? super.claimForUnpin(unit) : "not-pinned";
  }
}

/** Leaves P to whoever releases. */
class LateTable extends OpenTable {
  override claimForUnpin(unit: Unit): ReturnType<DmaTrackingTable["claimForUnpin"]> {
    if (this.memory.load32(unit) !== P) return super.claimForUnpin(unit);
    return "claimed";
  }
}

/** Clears D by load and store. */
class TornHarvestTable extends OpenTable {
  override takeDirty(unit: Unit): boolean {
    const seen = this.memory.load32(unit);
    if (seen & TU_DIRTY) this.memory.store32(unit, seen & ~TU_DIRTY);
    return (seen & (TU_DIRTY | TU_WRITABLE)) !== 0;
  }
}

/** Takes D for all there is to know. */
class BlindHarvestTable extends OpenTable {
  override takeDirty(unit: Unit): boolean {
    return (this.memory.and32(unit, ~TU_DIRTY) & TU_DIRTY) !== 0;
  }
}

/** Clears D with P. */
class ForgettingUnpinTable extends OpenTable {
  override claimForUnpin(unit: Unit): ReturnType<DmaTrackingTable["claimForUnpin"]> {
    const claim = super.claimForUnpin(unit);
    if (claim === "claimed") this.memory.and32(unit, ~TU_DIRTY);
    return claim;
  }
}

/** A table and a host that know of each other, for what is done in the wrong order. */
function lateTwin(): Twin {
  let table: OpenTable | undefined;
  class LateHost extends FakeHost {
    override release(handles: Int32Array, count: number): number {
      const before = [...this.pages];
      const released = super.release(handles, count);
      for (const { gfn } of before.filter((page) => !this.pages.has(page) && !this.holds(page.gfn))) {
        const unit = table?.walk(gfn) ?? NO_UNIT;
        if (unit !== NO_UNIT) table!.clearPinned(unit);
      }
      return released;
    }
  }
  return {
    backend: {
      openTable: (...args) => {
        table = new LateTable(...args);
        return table;
      },
      makeHost: (...args) => new LateHost(...args),
    },
  };
}

function earlyTwin(): Twin {
  let table: OpenTable | undefined;
  class EarlyHost extends FakeHost {
    override pin(...[addresses, count, ...others]: Parameters<FakeHost["pin"]>): void {
      for (const address of addresses.subarray(0, count)) {
        const unit = table?.walk(frameAt(address)) ?? NO_UNIT;
        if (unit !== NO_UNIT) table!.setPinned(unit);
      }
      super.pin(addresses, count, ...others);
    }
  }
  return {
    backend: {
      openTable: (...args) => {
        table = new OpenTable(...args);
        return table;
      },
      makeHost: (...args) => new EarlyHost(...args),
    },
  };
}

class HastyIommu extends SoftwareIommu {
  override quiesce(): boolean {
    return true;
  }
}

class LaxIommu extends SoftwareIommu {
  override revoke(): void {}
}

/** Looks at P, and counts then. */
class LookingUnits extends TrackingUnits {
  override get(gfn: number, nr: number): ReturnType<TrackingUnits["get"]> {
    let pinned = true;
    for (let i = 0; i < nr; i++) pinned &&= this.pinned(gfn + i);
    const counted = super.get(gfn, nr);
    return counted === "ask" && pinned ? "pinned" : counted;
  }
}

/** Counts by load and store. */
class TornUnits extends TrackingUnits {
  readonly memory: GuestMemory;
  constructor(...args: ConstructorParameters<typeof TrackingUnits>) {
    super(...args);
    this.memory = args[0];
  }
  override put(gfn: number, nr: number): number {
    for (let i = 0; i < nr; i++) {
      const unit = this.find(gfn + i);
      const seen = this.memory.load32(unit);
      if (seen & TU_COUNT) this.memory.store32(unit, seen - 1);
    }
    return nr;
  }
}

class DeafTracker extends CheckedTracker {
  override setQuota(): void {}
}

/** Says that a frame is pinned, and pins none. */
class PromisingTracker extends CheckedTracker {
  override touched(): boolean {
    return true;
  }
}

/** Believes that drivers tell of all that devices write. */
class TrustingIommu extends SoftwareIommu {
  override get writesUntold(): boolean {
    return false;
  }
}

/** Never unpins, whatever it is told. */
class HoldingTracker extends CheckedTracker {
  constructor([options, ...others]: ConstructorParameters<typeof CheckedTracker>) {
    super({ ...options, policy: createPolicy("off") }, ...others);
  }
  override setPolicy(): void {}
}

/** Its new policy hears of what is pinned from then on. */
class ForgetfulTracker extends CheckedTracker {
  readonly clock: Clock;
  constructor(...args: ConstructorParameters<typeof CheckedTracker>) {
    super(...args);
    this.clock = args[0].clock;
  }
  override setPolicy(policy: UnpinPolicy): void {
    const since = this.clock.now();
    super.setPolicy({
      ...{ name: policy.name, parameters: policy.parameters },
      pinned: (gfn, now) => now >= since && policy.pinned(gfn, now),
      tried: (...args) => policy.tried(...args),
      candidates: (...args) => policy.candidates(...args),
    });
  }
}

/** Waits for a driver for ever. */
class PatientTracker extends CheckedTracker {
  override get dueAt(): number {
    return Number.POSITIVE_INFINITY;
  }
}

/** Says that everything is pinned as soon as it begins. */
class HastyTracker extends CheckedTracker {
  readonly told: TrackingCounters;
  constructor(...args: ConstructorParameters<typeof CheckedTracker>) {
    super(...args);
    this.told = args[0].counters;
  }
  override live(): void {
    try {
      super.live();
    } finally {
      this.told.backgroundPinned = this.told.backgroundFrames;
    }
  }
}

/** A force-unpin that ignores COUNT, as it may ignore A; its passes are right. */
function forcedTwin(): Twin {
  let forced = false;
  class ForcedTable extends CountlessTable {
    override claimForUnpin(unit: Unit): ReturnType<DmaTrackingTable["claimForUnpin"]> {
      return forced ? super.claimForUnpin(unit) : DmaTrackingTable.prototype.claimForUnpin.call(this, unit);
    }
  }
  class ForcedTracker extends CheckedTracker {
    override unpinIdle(...args: Parameters<CheckedTracker["unpinIdle"]>) {
      forced = true;
      try {
        return super.unpinIdle(...args);
      } finally {
        forced = false;
      }
    }
  }
  return {
    backend: {
      openTable: (...args) => new ForcedTable(...args),
      makeTracker: (...args) => new ForcedTracker(...args),
    },
  };
}

/** Finds nothing that was discarded. */
class BlindHost extends FakeHost {
  override discarded(_addresses: Float64Array, count: number, out: Uint8Array): void {
    out.fill(0, 0, count);
  }
}

/** Says of what stayed that it has gone. */
class SilentTracker extends CheckedTracker {
  override unpinIdle(...args: Parameters<CheckedTracker["unpinIdle"]>) {
    return { ...super.unpinIdle(...args), stayed: [] };
  }
}

/** Sets D when it has counted down already. */
class LateDirtyUnits extends TornUnits {
  override put(gfn: number, nr: number, written?: boolean): number {
    const units = Array.from({ length: nr }, (_, i) => this.find(gfn + i));
    const dirty = units.filter((unit) => written !== false && this.memory.load32(unit) & TU_WRITABLE);
    const done = TrackingUnits.prototype.put.call(this, gfn, nr, false);
    for (const unit of dirty) this.memory.or32(unit, TU_DIRTY);
    return done;
  }
}

/** Leaves W when the last mapping goes. */
class LeavesWUnits extends TornUnits {
  override put(gfn: number, nr: number, written?: boolean): number {
    const units = Array.from({ length: nr }, (_, i) => this.find(gfn + i));
    const writable = units.filter((unit) => this.memory.load32(unit) & TU_WRITABLE);
    const done = TrackingUnits.prototype.put.call(this, gfn, nr, written);
    for (const unit of writable) this.memory.or32(unit, TU_WRITABLE);
    return done;
  }
}

/** Takes every unmap for one of a buffer that the device has only read. */
class CleanUnits extends TrackingUnits {
  override put(gfn: number, nr: number): number {
    return super.put(gfn, nr, false);
  }
}

export const twins: Readonly<Record<string, BrokenTwin>> = {
  "an unpin by load and store instead of one CAS": {
    twin: { backend: { openTable: (...args) => new TornTable(...args) } },
    found: LOST,
  },
  "an unpin that ignores COUNT": {
    twin: { backend: { openTable: (...args) => new CountlessTable(...args) } },
    found: LOST,
  },
  "a balloon of which nobody looks what is pinned": {
    twin: { backend: { makeHost: (...args) => new BlindHost(...args) } },
    found: GIVEN_AWAY,
    settings: BALLOONS,
  },
  "a force-unpin that does not tell what stayed": {
    twin: { backend: { makeTracker: (...args) => new SilentTracker(...args) } },
    found: GIVEN_AWAY,
    settings: BALLOONS,
  },
  "an unpin of frames that were mapped before PIN was turned on": {
    twin: { backend: { openTable: (...args) => new ForgetfulTable(...args) } },
    found: LOST,
  },
  "P cleared after the release": { twin: lateTwin, found: LOST },
  "P set before the page is pinned": { twin: earlyTwin, found: LOST },
  "a release while a DMA window is open": {
    twin: { backend: { makeIommu: (...args) => new HastyIommu(...args) } },
    found: LOST,
  },
  "an IOMMU that keeps what was revoked": {
    twin: { backend: { makeIommu: (...args) => new LaxIommu(...args) } },
    found: /the IOMMU allows frames|DMA to frame/,
  },
  ...hostTwins,
  "no quota": { twin: { backend: { quota: () => Number.POSITIVE_INFINITY } }, found: /the quota is/ },
  "a quota that is not changed at run time": {
    twin: { backend: { makeTracker: (...args) => new DeafTracker(...args) } },
    found: /the quota is/,
  },
  "a fault that is granted and not served": {
    twin: { backend: { makeTracker: (...args) => new PromisingTracker(...args) } },
    found: /of a fault-capable device, within the quota/,
  },
  "a harvest that relies on drivers, beside a device that faults": {
    twin: { backend: { makeIommu: (...args) => new TrustingIommu(...args) } },
    found: UNHARVESTED,
  },
  "a policy at run time that is not told what is pinned": {
    twin: { backend: { makeTracker: (...args) => new ForgetfulTracker(...args) } },
    found: /are idle and stay pinned/,
  },
  ...domainTwins,
  ...faultTwins,
  ...claimTwins,
  ...speculationTwins,
  "a guest without a driver that is not pinned": {
    twin: { backend: { makeTracker: (...args) => new PatientTracker(...args) } },
    found: /no driver was there in time/,
  },
  "a guest that is said to be pinned before it is": {
    twin: { backend: { makeTracker: (...args) => new HastyTracker(...args) } },
    found: /all RAM is said to be pinned/,
  },
  "a device that answers no request": {
    twin: { backend: { kickLost: () => true } },
    found: /lost|nobody can go on/,
  },
  "a policy that never unpins": {
    twin: { backend: { makeTracker: (...args) => new HoldingTracker(args) } },
    found: /are idle and stay pinned/,
  },
  "a driver that looks at P before it counts": {
    twin: { driver: { openUnits: (...args) => new LookingUnits(...args) } },
    // What is written between the claim and the release is in no unit that counts.
    found: new RegExp(`${LOST.source}|${UNHARVESTED.source}`),
  },
  "a driver that counts down by load and store": {
    twin: { driver: { openUnits: (...args) => new TornUnits(...args) } },
    found: /COUNT (is not )?0|unpinned while it is mapped|idle and stay pinned/,
  },
  "a harvest by load and store": {
    twin: { backend: { openTable: (...args) => new TornHarvestTable(...args) } },
    found: LOST_COUNT,
    settings: { pinDirty: true, harvestInterval: 0.4, hostile: false, buffers: 3 },
  },
  "a harvest that does not look at W": {
    twin: { backend: { openTable: (...args) => new BlindHarvestTable(...args) } },
    found: UNHARVESTED,
  },
  "an unpin that forgets D": {
    twin: { backend: { openTable: (...args) => new ForgettingUnpinTable(...args) } },
    found: UNHARVESTED,
  },
  "a driver that sets no D": {
    twin: { driver: { openUnits: (...args) => new CleanUnits(...args) } },
    found: UNHARVESTED,
  },
  "a driver that leaves W without a mapping": {
    twin: { driver: { openUnits: (...args) => new LeavesWUnits(...args) } },
    found: /idle and stay pinned/,
  },
};

/** Too rare for the random worlds: found where every schedule is played. */
export const rareTwins: typeof twins = {
  "a force-unpin that ignores COUNT": { twin: forcedTwin, found: LOST },
  "a driver that sets D after it has counted down": {
    twin: { driver: { openUnits: (...args) => new LateDirtyUnits(...args) } },
    found: UNHARVESTED,
  },
};
