import { HostError, InvariantViolation } from "../base/errors.ts";
import { grown } from "../base/frame-index.ts";
import { FRAME_SIZE, type Gfn, gpaOf } from "../base/units.ts";
import type { GuestMemory, GuestRegion } from "../memory/guest-memory.ts";
import type { GfnBuffer } from "../policy/policy.ts";
import type { FramePins } from "./frame-pins.ts";
import type { Ledger } from "./ledger.ts";
import type { Pinner } from "./pinner.ts";

/**
 * Frames that are pinned as one, at most. Longer ones pin hardly faster (docs/adr/0003); while one is split, its rest is
 * pinned twice and charged twice.
 */
export const EXTENT_FRAMES = 32;

interface Extent {
  readonly first: Gfn;
  readonly count: number;
  /** Pages of it that are of no frame any more. */
  orphans: number;
}

/**
 * The host's pins of the ledger's frames. Frames that follow each other, and that are pinned together, are one pin: an
 * extent. When some of them go, the rest gets pins of single frames, and then the extent is released: there is no moment
 * in which a frame of the rest is not pinned, and an extent is split once at most.
 *
 * A split never gives a frame memory, because what a balloon has discarded would stay with the guest, and be found by
 * nobody: it pins through GuestRegion.presentAddress, and memory that has none is pinned frame by frame from the start.
 * An extent with discarded frames stays as it is until they go too (addOthers), or have memory again.
 */
export class Extents implements FramePins {
  readonly #memory: GuestMemory;
  readonly #pinner: Pinner;
  readonly #ledger: Ledger;
  /** By handle; a pin of a single frame has no entry. */
  readonly #extents = new Map<number, Extent>();
  /** Handles of pins with pages of no frame any more, which are to go as soon as the host lets them. */
  readonly #abandoned = new Set<number>();
  #orphans = 0;
  #addresses = new Float64Array(256);
  #pages = new Int32Array(256);
  #handles = new Int32Array(256);
  readonly #lost = new Uint8Array(EXTENT_FRAMES);
  readonly #one = new Int32Array(1);

  constructor(memory: GuestMemory, pinner: Pinner, ledger: Ledger) {
    this.#memory = memory;
    this.#pinner = pinner;
    this.#ledger = ledger;
  }

  get orphans(): number {
    return this.#orphans;
  }
  get abandoned(): number {
    return this.#orphans;
  }

  /** An orphan is never taken over: what is pinned again gets a pin of its own. */
  covers(): boolean {
    return false;
  }

  pin(gfns: readonly Gfn[], pinned: (gfn: Gfn, handle: number) => void, present = false): void {
    this.#addresses = grown(this.#addresses, gfns.length);
    this.#pages = grown(this.#pages, gfns.length);
    this.#handles = grown(this.#handles, gfns.length);
    let extents = 0;
    let region: GuestRegion | undefined;
    for (let i = 0; i < gfns.length; i++) {
      const gpa = gpaOf(gfns[i]!);
      const before = region;
      region = this.#memory.find(gpa, FRAME_SIZE)!;
      const last = extents - 1;
      if (
        region === before &&
        region.presentAddress !== undefined &&
        gfns[i] === gfns[i - 1]! + 1 &&
        this.#pages[last]! < EXTENT_FRAMES
      )
        this.#pages[last]!++;
      else {
        const address = (present ? region.presentAddress : undefined) ?? region.hostAddress;
        this.#addresses[extents] = address + (gpa - region.gpa);
        this.#pages[extents++] = 1;
      }
    }
    this.#pinner.pin(this.#addresses, extents, this.#handles, this.#pages);
    for (let extent = 0, i = 0; extent < extents; extent++) {
      const handle = this.#handles[extent]!;
      const count = this.#pages[extent]!;
      if (count > 1) this.#extents.set(handle, { first: gfns[i]!, count, orphans: 0 });
      for (const to = i + count; i < to; i++) pinned(gfns[i]!, handle);
    }
  }

  adopt(
    pages: Iterable<readonly [gfn: Gfn, handle: number]>,
    pinned: (gfn: Gfn, handle: number) => void,
  ): void {
    for (const [gfn, handle] of pages) {
      const { first, count, orphans } = this.#extents.get(handle) ?? { first: gfn, count: 0, orphans: 0 };
      this.#extents.set(handle, { first, count: count + 1, orphans });
      if (this.#ledger.has(gfn)) this.#abandon(handle);
      else pinned(gfn, handle);
    }
    for (const [handle, { count }] of this.#extents) if (count === 1) this.#extents.delete(handle);
  }

  abandon(_gfn: Gfn, handle: number): void {
    this.#abandon(handle);
  }

  #abandon(handle: number): void {
    this.#abandoned.add(handle);
    this.#orphans++;
    const extent = this.#extents.get(handle);
    if (extent) extent.orphans++;
  }

  readonly waiting = 0;
  dropWaiting(): void {}
  used(): void {}

  /** An extent that is split has to lose those too that have lost their memory. */
  addOthers(gfns: GfnBuffer): boolean {
    if (this.#extents.size === 0) return true;
    for (const [handle, going] of this.#byHandle(gfns)) {
      try {
        for (const gfn of this.#discarded(this.#rest(handle, going))) gfns.push(gfn);
      } catch (error) {
        if (!(error instanceof HostError)) throw error;
      }
    }
    return true;
  }

  release(gfns: GfnBuffer): ReadonlySet<number> {
    return this.#release(this.#byHandle(gfns));
  }

  /** The rest of their extents stays pinned. */
  releaseOrphans(): void {
    this.#release(new Map([...this.#abandoned].map((handle): [number, Gfn[]] => [handle, []])));
  }

  collectOrphans(): null {
    return null;
  }

  #byHandle(gfns: GfnBuffer): Map<number, Gfn[]> {
    const groups = new Map<number, Gfn[]>();
    for (let i = 0; i < gfns.length; i++) {
      const handle = this.#ledger.handle(gfns.at(i));
      const group = groups.get(handle);
      if (group) group.push(gfns.at(i));
      else groups.set(handle, [gfns.at(i)]);
    }
    return groups;
  }

  /** What can go as a whole first: that needs no room, and makes some for what is split. */
  #release(groups: ReadonlyMap<number, readonly Gfn[]>): Set<number> {
    const kept = new Set<number>();
    const parts: number[] = [];
    this.#handles = grown(this.#handles, groups.size);
    let whole = 0;
    for (const [handle, going] of groups)
      if (this.#rest(handle, going).length > 0) parts.push(handle);
      else this.#handles[whole++] = handle;
    const released = this.#pinner.release(this.#handles, whole);
    for (let i = 0; i < whole; i++)
      if (i < released) this.#forget(this.#handles[i]!);
      else kept.add(this.#handles[i]!);
    for (const handle of parts)
      if (!this.#split(handle, this.#rest(handle, groups.get(handle)!))) kept.add(handle);
    return kept;
  }

  /** Frames that this pin is for, beside those that are going. */
  #rest(handle: number, going: readonly Gfn[]): Gfn[] {
    const extent = this.#extents.get(handle);
    if (!extent || going.length + extent.orphans === extent.count) return [];
    const rest: Gfn[] = [];
    for (let gfn = extent.first; gfn < extent.first + extent.count; gfn++)
      if (this.#ledger.has(gfn) && this.#ledger.handle(gfn) === handle && !going.includes(gfn))
        rest.push(gfn);
    if (rest.length + going.length + extent.orphans !== extent.count)
      throw new InvariantViolation(`pin ${handle} of ${extent.count} frames, of which ${rest.length} stay`);
    return rest;
  }

  /** Those of `rest`, frames of one extent, that have lost their memory. Throws HostError. */
  #discarded(rest: readonly Gfn[]): Gfn[] {
    if (rest.length === 0) return [];
    // From its first to its last: one call of the host's, and not one for each gap.
    const first = rest[0]!;
    const count = rest.at(-1)! - first + 1;
    const address = this.#memory.hostAddress(gpaOf(first));
    for (let i = 0; i < count; i++) this.#addresses[i] = address + i * FRAME_SIZE;
    this.#pinner.discarded(this.#addresses, count, this.#lost);
    return rest.filter((gfn) => this.#lost[gfn - first] === 1);
  }

  /**
   * Pin each of `rest` for itself, and release the pin that they had. False when that is still there: the host has
   * refused, or one of `rest` has lost its memory.
   */
  #split(handle: number, rest: readonly Gfn[]): boolean {
    const handles = new Int32Array(rest.length);
    try {
      for (const [i, gfn] of rest.entries()) {
        const address = this.#memory.presentAddress(gpaOf(gfn));
        // Only of an extent that was taken over.
        if (address === undefined) return false;
        this.#addresses[i] = address;
      }
      this.#pinner.pin(this.#addresses, rest.length, handles);
    } catch (error) {
      if (!(error instanceof HostError)) throw error;
      return false;
    }
    rest.forEach((gfn, i) => {
      this.#ledger.setHandle(gfn, handles[i]!);
    });
    this.#one[0] = handle;
    if (this.#pinner.release(this.#one, 1) === 1) {
      this.#forget(handle);
      return true;
    }
    // What is going can go as a whole from now on, so that a host that refuses is not asked for more pins again and again.
    for (const _ of rest) this.#abandon(handle);
    return false;
  }

  /** A pin has been released. */
  #forget(handle: number): void {
    const orphans = this.#extents.get(handle)?.orphans ?? Number(this.#abandoned.has(handle));
    this.#orphans -= orphans;
    this.#extents.delete(handle);
    this.#abandoned.delete(handle);
  }
}
