import { grown } from "../base/frame-index.ts";
import { FRAME_SIZE, type Gfn, gpaOf } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import type { Mappings } from "./block.ts";
import type { Pinner } from "./pinner.ts";

/** Frames of mappings whose memory is not the pinned page any more, and will not be as long as the mapping is there. */
export class StalePages {
  readonly #memory: GuestMemory;
  readonly #pinner: Pinner;
  readonly #mappings: Mappings;
  /** By the id of the mapping. */
  readonly #stale = new Map<number, Set<Gfn>>();
  #addresses = new Float64Array(512);
  #lost = new Uint8Array(512);

  constructor(memory: GuestMemory, pinner: Pinner, mappings: Mappings) {
    this.#memory = memory;
    this.#pinner = pinner;
    this.#mappings = mappings;
  }

  /** Those of `gfns`, frames of one mapping, that are stale by now. Throws HostError. */
  find(id: number, gfns: readonly Gfn[]): Gfn[] {
    const toHost = this.#mappings.hostAddress[id]! - gpaOf(this.#mappings.first[id]! as Gfn);
    const moved = (gfn: Gfn) => {
      const region = this.#memory.find(gpaOf(gfn), FRAME_SIZE);
      return !region || region.hostAddress - region.gpa !== toHost;
    };
    const lost = [...gfns.filter(moved), ...this.withoutMemory(gfns.filter((gfn) => !moved(gfn)))];
    const before = this.#stale.get(id);
    if (lost.length === 0 && !before) return [];
    const stale = before ?? new Set();
    for (const gfn of lost) stale.add(gfn);
    this.#stale.set(id, stale);
    return gfns.filter((gfn) => stale.has(gfn));
  }

  /** The mapping is gone. */
  forget(id: number): void {
    this.#stale.delete(id);
  }

  /** Those of `gfns`, which are RAM, that have no memory now. Throws HostError. */
  withoutMemory(gfns: readonly Gfn[]): Gfn[] {
    if (gfns.length === 0) return [];
    this.#addresses = grown(this.#addresses, gfns.length);
    this.#lost = grown(this.#lost, gfns.length);
    for (const [i, gfn] of gfns.entries()) this.#addresses[i] = this.#memory.hostAddress(gpaOf(gfn));
    this.#pinner.discarded(this.#addresses, gfns.length, this.#lost);
    return gfns.filter((_, i) => this.#lost[i] === 1);
  }
}
