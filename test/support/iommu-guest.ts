/** A guest behind an IOMMU: a host that maps each page once. */
import type { Gfn, Gpa } from "../../src/base/units.ts";
import { GuestMemory } from "../../src/memory/guest-memory.ts";
import { Blocks } from "../../src/tracking/blocks.ts";
import { Ledger } from "../../src/tracking/ledger.ts";
import { addressOf, ramRegion } from "./guest.ts";
import { active, type Machine, type MachineOptions, RAM_FRAMES } from "./machine.ts";
import { FakeIommuPinner } from "./pinner.ts";

export const INFINITY = Number.POSITIVE_INFINITY;
export const frames = (first: number, count: number) => Array.from({ length: count }, (_, i) => first + i);

export const behindIommu = (options: MachineOptions = {}): Machine<FakeIommuPinner> =>
  active({ ...options, pinner: new FakeIommuPinner() });

/** First frame and length of each mapping, ascending. */
export const runs = ({ pinner }: Machine<FakeIommuPinner>) =>
  [...pinner.mappings.values()]
    .map((gfns) => [Math.min(...gfns), gfns.length] as const)
    .sort(([a], [b]) => a - b);

export const passes = (m: Machine<FakeIommuPinner>, count = 2) => {
  for (let i = 0; i < count; i++) m.pass();
};

/** Force-unpin, slice by slice. */
export function unpinNow(m: Machine<FakeIommuPinner>, first = 0, end = INFINITY, discarded = false) {
  const stayed: Gfn[] = [];
  for (let from: number | null = 0; from !== null; ) {
    const slice: ReturnType<typeof m.tracker.unpinIdle> = m.tracker.unpinIdle({
      first,
      end,
      from,
      discarded,
    });
    stayed.push(...slice.stayed);
    from = slice.next;
  }
  return stayed;
}

/** No frame has memory that the guest has not used. */
export const untouched = (m: Machine<FakeIommuPinner>) => {
  for (let gfn = 0; gfn < RAM_FRAMES; gfn++) m.pinner.holes.add(addressOf(gfn));
};

/** Blocks alone, with RAM from frame `first` on. */
export function blocksAlone(first: number, count: number) {
  const memory = new GuestMemory([{ ...ramRegion(0, count), gpa: (first * 4096) as Gpa }]);
  const pinner = new FakeIommuPinner();
  const ledger = new Ledger();
  const blocks = new Blocks({ memory, pinner, ledger, room: () => INFINITY, mayPin: () => true });
  return { blocks, ledger, pinner };
}
