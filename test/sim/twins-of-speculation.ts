/** What pins unasked, broken in one place. */
import type { Settings } from "../../src/sim/settings.ts";
import type { Twin } from "../../src/sim/world.ts";
import { SPECULATED } from "../../src/tracking/ledger.ts";
import { Speculator, type SpeculatorOptions } from "../../src/tracking/speculator.ts";
import type { BrokenTwin } from "./twins.ts";

const NEIGHBOURS: Partial<Settings> = { speculate: "neighbours,budget=4,judged=60000", hostile: false };

const made = (makeSpeculator: (o: SpeculatorOptions) => Speculator): Twin => ({
  backend: { makeSpeculator },
});

/** Shows P, and pins then. */
function early(o: SpeculatorOptions): Speculator {
  const pinPresent = o.pins.pinPresent.bind(o.pins);
  o.pins.pinPresent = (gfns, generation) => {
    for (const gfn of gfns) o.table.show(gfn);
    pinPresent(gfns, generation);
  };
  return new Speculator(o);
}

/** Pins as if the guest had asked. */
function generous(o: SpeculatorOptions): Speculator {
  o.pins.pinPresent = (gfns, generation) => o.pins.pin(gfns, generation);
  o.pins.dropDiscarded = () => {};
  return new Speculator(o);
}

/** Has the guest ask for what the one before has pinned. */
class Switching extends Speculator {
  readonly o: SpeculatorOptions;
  constructor(o: SpeculatorOptions) {
    super(o);
    this.o = o;
  }
  override choose(...args: Parameters<Speculator["choose"]>): void {
    const { pins, table } = this.o;
    for (const gfn of pins.ledger.frames())
      if (pins.ledger.generation(gfn) === SPECULATED) table.clearPinned(gfn);
    super.choose(...args);
  }
}

/** Does not wait for what becomes of the request. */
class Hasty extends Speculator {
  override expect(...args: Parameters<Speculator["expect"]>): void {
    super.expect(...args);
    super.pin();
  }
  override pin(): void {}
}

/** Believes P of an earlier table. */
class Lasting extends Speculator {
  override tableCloses(): void {}
}

export const speculationTwins: Readonly<Record<string, BrokenTwin>> = {
  "a frame that is pinned unasked after P is set": {
    twin: made(early),
    found: /unpinned while it is mapped|DMA to (?:frame|GPA)|DMA fault|the host does not hold it/,
    settings: { ...NEIGHBOURS, pinFails: 3 },
  },
  "frames that are pinned unasked above the quota": {
    twin: made((o) => new Speculator({ ...o, room: () => Number.POSITIVE_INFINITY })),
    found: /the quota is/,
    settings: { ...NEIGHBOURS, quota: 8 },
  },
  "a pin unasked that gives memory to what was discarded": {
    twin: made(generous),
    found: /gets memory unasked/,
    settings: { ...NEIGHBOURS, balloon: true },
  },
  "another speculation at run time, which takes back P of what is pinned": {
    twin: made((o) => new Switching(o)),
    found: /are idle and stay pinned/,
    settings: { ...NEIGHBOURS, operator: 20 },
  },
  "frames that are pinned unasked for a request that is refused": {
    twin: made((o) => new Hasty(o)),
    found: /PIN was refused/,
    settings: NEIGHBOURS,
  },
  "P of what was pinned unasked that is believed after PIN was off": {
    twin: made((o) => new Lasting(o)),
    found: /are idle and stay pinned|the guest has claimed/,
    settings: { ...NEIGHBOURS, driverRestarts: true, frontEnd: "virtio-iommu", remapping: "none" },
  },
};
