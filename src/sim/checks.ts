import { FRAME_SIZE, type Gfn } from "../base/units.ts";
import type { GuestRegion } from "../memory/guest-memory.ts";
import type { DirtySlice } from "../tracking/dirty.ts";
import type { ClaimsModel } from "./claims-model.ts";
import type { FakeHost } from "./fake-host.ts";
import { Violation } from "./turn.ts";

/**
 * What must hold, judged from outside: by what the fake host holds and what the guest's drivers have been told, never
 * by what the code under test says of itself.
 */
export class Checks {
  readonly claims: ClaimsModel;
  readonly #host: FakeHost;
  readonly #isRam: (gfn: number) => boolean;
  /** Frames this guest may have pinned at once. */
  readonly #quota: () => number;
  /** Mappings that a driver has, by frame: from the success of the map to the start of the unmap. */
  readonly #mapped = new Map<number, number>();
  /** A guest that writes garbage only hurts itself: what it loses is no fault of the host's. */
  readonly #hostile: boolean;
  /** Frames that devices have written and no harvest has given since, and how many harvests had begun before. */
  readonly #written = new Map<number, number>();
  #harvests = 0;
  /** How often a device asked for a frame when there was no room, or when the host failed. */
  #excuses = 0;

  constructor(o: {
    host: FakeHost;
    isRam: (gfn: number) => boolean;
    quota: () => number;
    hostile: boolean;
    claims: ClaimsModel;
  }) {
    this.claims = o.claims;
    this.#host = o.host;
    this.#isRam = o.isRam;
    this.#quota = o.quota;
    this.#hostile = o.hostile;
  }

  /** The host has pinned a page, see HostObserver. */
  pinned(gfn: Gfn, present: boolean, anew: boolean): void {
    const splits = present && this.#host.pins(gfn) > 1;
    if (!splits) this.claims.forget(gfn);
    if (present) this.claims.speculated(gfn);
    if (!this.#isRam(gfn)) throw new Violation(`frame ${gfn} is pinned, which is not RAM`);
    const held = this.#host.pages.size;
    const quota = this.#quota();
    if (present && anew) throw new Violation(`frame ${gfn}, which was discarded, gets memory unasked`);
    // While an extent is split, its rest is pinned twice.
    if (held > quota && !splits) throw new Violation(`${held} pages are pinned, the quota is ${quota}`);
  }

  /** The host has let go of a page. */
  released(gfn: Gfn): void {
    this.claims.forget(gfn);
    if (!this.#hostile && (this.#mapped.get(gfn) ?? 0) > 0)
      throw new Violation(`frame ${gfn} is unpinned while it is mapped`);
  }

  /** A device's DMA, in a buffer of these frames if it is known, got past the IOMMU. */
  transferred(gpa: number, length: number, writes: boolean, buffer?: readonly number[]): void {
    for (let gfn = Math.floor(gpa / FRAME_SIZE); gfn * FRAME_SIZE < gpa + length; gfn++) {
      if (!this.#hostile && buffer && !buffer.includes(gfn))
        throw new Violation(`DMA to frame ${gfn}, which is not of the buffer ${buffer}`);
      if (!this.#host.holds(gfn)) throw new Violation(`DMA to frame ${gfn}, which the host does not hold`);
      // A device that no driver tells of may touch what its guest has given away.
      if (!this.#hostile && buffer && !this.#host.holdsPresent(gfn))
        throw new Violation(`DMA to frame ${gfn} hits a page that the guest has given away`);
      if (writes && !this.#written.has(gfn)) this.#written.set(gfn, this.#harvests);
    }
  }

  /** What is to be harvested still, as text. */
  get unharvested(): string {
    return [...this.#written]
      .map(([gfn, harvests]) => `${gfn}:${harvests}`)
      .sort()
      .join();
  }

  /** The host begins a harvest. */
  harvestBegins(): void {
    this.#harvests++;
  }

  /** The host has given a slice of a harvest: whoever migrates the guest copies its frames now. */
  harvested({ ranges, more }: DirtySlice): void {
    for (let i = 0; i < ranges.length; i += 2)
      for (let gfn = ranges[i]!; gfn < ranges[i]! + ranges[i + 1]!; gfn++) this.#written.delete(gfn);
    if (more || this.#hostile) return;
    for (const [gfn, harvests] of this.#written)
      if (harvests < this.#harvests)
        throw new Violation(`a device wrote frame ${gfn} before a harvest, which does not give it`);
  }

  /** Whoever migrates the guest copies all of it, and begins anew. */
  copiedAll(): void {
    this.#written.clear();
  }

  /** A device's DMA was refused by the IOMMU, in a buffer that was mapped. */
  faulted(gpa: number): void {
    if (!this.#hostile) throw new Violation(`a DMA fault at 0x${gpa.toString(16)}, in a mapped buffer`);
  }

  faultMayFail(): void {
    this.#excuses++;
  }

  /**
   * A fault-capable device begins an access that no driver has mapped. Returns what to call if it faults for good: a
   * hostile guest may have put it into a domain, where it does.
   */
  faultable(): (gpa: number) => void {
    const before = this.#excuses;
    return (gpa) => {
      if (this.#excuses === before && !this.#hostile)
        throw new Violation(`a fault at 0x${gpa.toString(16)} of a fault-capable device, within the quota`);
    };
  }

  /** A driver has been told that a mapping succeeded. */
  mapped(gfns: readonly number[]): void {
    for (const gfn of gfns) {
      this.#mapped.set(gfn, (this.#mapped.get(gfn) ?? 0) + 1);
      if (!this.#hostile && !this.#host.holds(gfn))
        throw new Violation(`frame ${gfn} is mapped, but the host does not hold it`);
    }
  }

  /** A driver begins to unmap. */
  unmapping(gfns: readonly number[]): void {
    for (const gfn of gfns) this.#mapped.set(gfn, this.#mapped.get(gfn)! - 1);
  }

  /** The machine is reset: its drivers are gone. */
  forgetMappings(): void {
    this.#mapped.clear();
  }

  /** Between two pieces of the host's work, what it keeps must be what the kernel holds and the IOMMU allows. */
  accounts(
    ledger: Iterable<Gfn>,
    pinned: number,
    ram: readonly GuestRegion[],
    allowed: (gfn: number) => boolean,
  ): void {
    let entries = 0;
    for (const gfn of ledger) {
      entries++;
      if (!this.#host.holds(gfn)) throw new Violation(`the ledger has frame ${gfn}, the host does not`);
      if (!allowed(gfn)) throw new Violation(`frame ${gfn} is pinned, but the IOMMU forbids it`);
    }
    if (pinned !== this.#host.pages.size)
      throw new Violation(`the host holds ${this.#host.pages.size} pages, the tracker says ${pinned}`);
    for (const { gpa, size } of ram)
      for (let gfn = gpa / FRAME_SIZE; gfn < (gpa + size) / FRAME_SIZE; gfn++) if (allowed(gfn)) entries--;
    if (entries !== 0) throw new Violation("the IOMMU allows frames that are not in the ledger");
  }

  /** Whether all RAM is pinned, as far as the host's kernel knows. */
  allHeld(ram: readonly GuestRegion[]): boolean {
    return this.#notHeld(ram) === undefined;
  }

  #notHeld(ram: readonly GuestRegion[]): number | undefined {
    for (const { gpa, size } of ram)
      for (let gfn = gpa / FRAME_SIZE; gfn < (gpa + size) / FRAME_SIZE; gfn++)
        if (!this.#host.holds(gfn)) return gfn;
    return undefined;
  }

  /** The host says that all RAM is pinned, for devices of which no driver tells. */
  saidComplete(ram: readonly GuestRegion[]): void {
    const gfn = this.#notHeld(ram);
    if (gfn !== undefined) throw new Violation(`all RAM is said to be pinned, but frame ${gfn} is not held`);
  }

  /** Everything is unmapped, and passes enough have been: nothing may be pinned any more. */
  atRest(): void {
    if (this.#host.pages.size > 0)
      throw new Violation(`frames ${[...this.#host.pages].map(({ gfn }) => gfn)} are idle and stay pinned`);
  }
}
