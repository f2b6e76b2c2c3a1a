import assert from "node:assert/strict";
import type { Gfn } from "../../src/base/units.ts";
import { counters, countersBuffer } from "../../src/memory/counters.ts";
import { GuestMemory, type GuestRegion } from "../../src/memory/guest-memory.ts";
import { createPolicy } from "../../src/policy/registry.ts";
import {
  countUnused,
  createIommuBuffer,
  DeviceGate,
  SoftwareIommu,
} from "../../src/tracking/software-iommu.ts";
import { TRACKING_COUNTERS, Tracker, type TrackerOptions } from "../../src/tracking/tracker.ts";
import { FakeClock } from "./clock.ts";
import { addressOf, GuestTable, ramRegion } from "./guest.ts";
import { FakePinner } from "./pinner.ts";

export const RAM_FRAMES = 2048;
/** Table pages of the guest lie from here on. */
export const TABLE_FRAME = 1536;

export interface MachineOptions<P extends FakePinner = FakePinner> extends Partial<TrackerOptions> {
  readonly pinner?: P;
  readonly regions?: readonly GuestRegion[];
  readonly levels?: number;
}

/** A guest of 8 MiB, and a tracker over a fake host. The table is not activated. */
export function machine<P extends FakePinner = FakePinner>(options: MachineOptions<P> = {}) {
  const { regions = [ramRegion(0, RAM_FRAMES)], levels = 2, ...rest } = options;
  const clock = new FakeClock();
  const memory = options.memory ?? new GuestMemory();
  const pinner = options.pinner ?? (new FakePinner() as P);
  const iommuBuffer = createIommuBuffer(2 ** 20);
  const iommu = new SoftwareIommu(iommuBuffer, clock);
  const gate = new DeviceGate(iommuBuffer, 0, () =>
    iommu.serveRequests((...asked) => tracker.touched(...asked)),
  );
  const otherGate = new DeviceGate(iommuBuffer, 1, () => {});
  const policy = createPolicy("lru");
  const count = counters(TRACKING_COUNTERS, countersBuffer(TRACKING_COUNTERS));
  const tracker: Tracker = new Tracker({
    memory,
    pinner,
    iommu,
    policy,
    clock,
    counters: count,
    quota: Number.POSITIVE_INFINITY,
    beforeActivation: "none",
    ...rest,
  });
  tracker.setMemory(regions);
  const table = new GuestTable(memory, TABLE_FRAME * 4096, levels);

  return {
    clock,
    memory,
    pinner,
    iommu,
    gate,
    otherGate,
    tracker,
    table,
    counters: count,
    /** Frames that the guest has asked for, and of them those that no device has reached since. */
    claims: () => [count.framesClaimed, countUnused(iommuBuffer)],
    /** Whether DMA to each of `gfns` would go through, and the host holds its page. Both or neither. */
    held(...gfns: number[]): boolean[] {
      return gfns.map((gfn) => {
        const allowed = gate.allows(gfn as Gfn);
        if (allowed !== pinner.isPinned(addressOf(gfn)))
          throw new Error(`frame ${gfn}: IOMMU ${allowed ? "maps" : "does not map"} it, the host disagrees`);
        return allowed;
      });
    },
    activate(complete = true, marksDirty = false): void {
      for (const gfn of [0, 1024]) if (gfn < 1024 * 512 ** (levels - 1)) table.unit(gfn);
      if (!tracker.activate(table.root, levels, complete, marksDirty))
        throw new Error("the table is refused");
    },
    /** What a driver does for a mapping: count, and ask when P is clear. Returns the status of the request. */
    map(...gfns: number[]): number {
      const missing = gfns.filter((gfn) => !table.map(gfn));
      return missing.length ? tracker.pin(missing.map((gfn) => ({ gfn, nrFrames: 1 }))) : 0;
    },
    unmap(...gfns: number[]): void {
      for (const gfn of gfns) table.unmap(gfn);
    },
    /** A whole unpin pass. Returns its number of slices. */
    pass(): number {
      tracker.startPass();
      let slices = 1;
      while (tracker.slice()) slices++;
      return slices;
    },
  };
}

export type Machine<P extends FakePinner = FakePinner> = ReturnType<typeof machine<P>>;

/** The same, with its table activated. */
export function active<P extends FakePinner = FakePinner>(
  options: MachineOptions<P> = {},
  complete = true,
): Machine<P> {
  const m = machine(options);
  m.activate(complete);
  return m;
}

/** Map, and unmap again: frames that are pinned and idle, with A set. */
export function idle(m: Pick<Machine, "map" | "unmap">, ...gfns: number[]): void {
  assert.equal(m.map(...gfns), 0);
  m.unmap(...gfns);
}
