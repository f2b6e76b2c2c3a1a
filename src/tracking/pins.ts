import type { Clock } from "../base/clock.ts";
import { grown } from "../base/frame-index.ts";
import { type Gfn, gpaOf, type Nanoseconds } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import type { Claim, GfnBuffer, UnpinPolicy } from "../policy/policy.ts";
import { Blocks } from "./blocks.ts";
import { Extents } from "./extents.ts";
import type { FramePins, OrphanRange } from "./frame-pins.ts";
import { isAsked, Ledger, NO_TABLE, ONLY_DOMAINS, SPECULATED } from "./ledger.ts";
import { framesOf, type Mapping } from "./mapping-trees.ts";
import type { Pinner } from "./pinner.ts";
import type { SoftwareIommu } from "./software-iommu.ts";

/** Told what a policy is told, also of what was pinned before the policy came. */
export interface PinObserver extends Pick<UnpinPolicy, "tried"> {
  /** `unasked`: the guest has not asked for the frame. */
  pinned(gfn: Gfn, now: Nanoseconds, unasked: boolean): void;
  /** The guest has used a frame that was pinned unasked. */
  used?(gfn: Gfn, now: Nanoseconds): void;
}

/**
 * The frames that are pinned one by one. Keeps what must agree in step: the ledger, the kernel's pins, the IOMMU's
 * table and the policy's list. Whatever the host refuses, no frame is half-pinned.
 */
export class Pins {
  readonly ledger: Ledger;
  readonly #memory: GuestMemory;
  readonly #pinner: Pinner;
  readonly #extents: FramePins;
  readonly #iommu: SoftwareIommu;
  readonly #clock: Clock;
  #policy: UnpinPolicy;
  readonly #observers: PinObserver[];
  /** A moment before the policy came. */
  #beforePolicy = 0 as Nanoseconds;
  /** The policy has been told of the frames in the ledger's slots below this. */
  #told = Number.POSITIVE_INFINITY;
  #addresses = new Float64Array(256);
  #handles = new Int32Array(256);
  #lost = new Uint8Array(256);

  constructor(o: {
    readonly memory: GuestMemory;
    readonly pinner: Pinner;
    readonly iommu: SoftwareIommu;
    readonly policy: UnpinPolicy;
    readonly clock: Clock;
    /** See Blocks. */
    readonly room?: () => number;
    readonly mayPin?: (gfn: Gfn) => boolean;
    /** Told what a policy is told, also of what was pinned before the policy came. */
    readonly observers?: readonly PinObserver[] | undefined;
  }) {
    this.#memory = o.memory;
    this.#pinner = o.pinner;
    this.ledger = new Ledger((gfn, claimed) => o.iommu.setUnused(gfn, claimed));
    const { room = () => Number.POSITIVE_INFINITY, mayPin = () => true } = o;
    this.#extents = o.pinner.mapsOnce
      ? new Blocks({ memory: o.memory, pinner: o.pinner, ledger: this.ledger, room, mayPin })
      : new Extents(o.memory, o.pinner, this.ledger);
    this.#iommu = o.iommu;
    this.#policy = o.policy;
    this.#observers = [...(o.observers ?? [])];
    this.#clock = o.clock;
  }

  observe(observer: PinObserver): void {
    this.#observers.push(observer);
  }

  get policy(): UnpinPolicy {
    return this.#policy;
  }

  /** It is told of what is pinned by and by: see tellPolicy(). */
  setPolicy(policy: UnpinPolicy): void {
    this.#policy = policy;
    this.#beforePolicy = (this.#clock.now() - 1) as Nanoseconds;
    this.#told = 0;
  }

  /** Tell a policy that came late of `slots` more slots. False when it had been told of all. */
  tellPolicy(slots: number): boolean {
    if (this.#told === Number.POSITIVE_INFINITY) return false;
    const end = Math.min(this.#told + slots, this.ledger.slots);
    for (; this.#told < end; this.#told++) {
      const gfn = this.ledger.at(this.#told);
      if (gfn !== undefined) this.#policy.pinned(gfn, this.#beforePolicy);
    }
    if (end === this.ledger.slots) this.#told = Number.POSITIVE_INFINITY;
    return true;
  }

  /** Pages pinned. */
  get size(): number {
    return this.ledger.size + this.orphans;
  }
  /** Of them, those of no frame of the ledger. */
  get orphans(): number {
    return this.#extents.orphans;
  }
  /** Pages that nobody uses, pinned with others that are used. */
  get beyondNeed(): number {
    return this.orphans + this.#extents.waiting;
  }
  /** Of the orphans, those that had to go while the host kept them, and are tried again. */
  get abandoned(): number {
    return this.#extents.abandoned;
  }
  /** Whether pinning a frame that is not in the ledger takes over an orphan. */
  covers(gfn: Gfn): boolean {
    return this.#extents.covers(gfn);
  }
  /** See FramePins.collectOrphans(). */
  collectOrphans(range: OrphanRange, from: number, out: Gfn[]): number | null {
    return this.#extents.collectOrphans(range, from, out);
  }

  /** Pin frames that are RAM and not pinned yet. Throws HostError; then none of them is. */
  pin(gfns: readonly Gfn[], generation: number): void {
    this.#pin(gfns, generation, false);
  }

  /** The same for what nobody has asked for: where it can be told, only if all of them have memory. */
  pinPresent(gfns: readonly Gfn[], generation: number): void {
    this.#pin(gfns, generation, true);
  }

  #pin(gfns: readonly Gfn[], generation: number, present: boolean): void {
    if (gfns.length === 0) return;
    const now = this.#clock.now();
    this.#extents.pin(gfns, (gfn, handle) => this.#hold(gfn, handle, generation, now), present);
  }

  #hold(gfn: Gfn, handle: number, generation: number, now: Nanoseconds): void {
    const slot = this.ledger.add(gfn, handle, generation);
    this.#iommu.allow(gfn, isAsked(generation));
    if (slot < this.#told) this.#policy.pinned(gfn, now);
    for (const observer of this.#observers) observer.pinned(gfn, now, generation === SPECULATED);
  }

  /** The guest has used a frame that was pinned unasked. */
  tellUsed(gfn: Gfn, now: Nanoseconds): void {
    for (const observer of this.#observers) observer.used?.(gfn, now);
  }

  /** Take over pins that an earlier backend made and did not release; the host still holds them. See FramePins.adopt(). */
  adopt(pages: Iterable<readonly [gfn: Gfn, handle: number]>): void {
    const now = this.#clock.now();
    this.#extents.adopt(pages, (gfn, handle) => this.#hold(gfn, handle, NO_TABLE, now));
  }

  /** Append frames that are to be tried too, see FramePins.addOthers(). */
  addOthers(gfns: GfnBuffer): boolean {
    return this.#extents.addOthers(gfns);
  }

  /** See FramePins.dropWaiting(). */
  dropWaiting(gfns: GfnBuffer, waits: (gfn: Gfn) => void): void {
    this.#extents.dropWaiting(gfns, waits);
  }

  /**
   * Unpin frames whose P has been cleared. Returns how many went, and leaves the others in `gfns`: they are pinned as
   * before, because a device kept a DMA window open or the host refused.
   */
  unpin(gfns: GfnBuffer, now: Nanoseconds): number {
    const count = gfns.length;
    if (count === 0) return 0;
    this.#handles = grown(this.#handles, count);
    for (let i = 0; i < count; i++) {
      this.#iommu.revoke(gfns.at(i));
      this.#handles[i] = this.ledger.handle(gfns.at(i));
    }
    const kept = this.#iommu.quiesce() ? this.#extents.release(gfns, this.#handles) : undefined;
    gfns.keep((i) => {
      const gfn = gfns.at(i);
      const went = kept?.has(this.#handles[i]!) === false;
      if (went) this.ledger.remove(gfn);
      else this.#iommu.allow(gfn);
      this.tried(gfn, went ? "claimed" : "refused", now);
      return !went;
    });
    return count - gfns.length;
  }

  /** See FramePins.used(). */
  used(gfn: Gfn): void {
    this.#extents.used(gfn);
  }

  tried(gfn: Gfn, outcome: Claim, now: Nanoseconds): void {
    this.#policy.tried(gfn, outcome, now);
    for (const observer of this.#observers) observer.tried(gfn, outcome, now);
  }

  /** Keep of `gfns`, which are pinned, those whose memory the host has lost meanwhile. Throws HostError. */
  keepDiscarded(gfns: GfnBuffer): void {
    this.#findDiscarded(gfns);
    gfns.keep((i) => this.#lost[i] === 1);
  }

  /** Keep of `gfns`, which are not pinned, those that have memory. Throws HostError. */
  dropDiscarded(gfns: GfnBuffer): void {
    // Memory without an address is this process's own, and nobody discards it.
    if (this.#memory.regions.every(({ hostAddress }) => hostAddress === 0)) return;
    this.#findDiscarded(gfns);
    gfns.keep((i) => this.#lost[i] === 0);
  }

  #findDiscarded(gfns: GfnBuffer): void {
    const count = gfns.length;
    this.#addresses = grown(this.#addresses, count);
    this.#lost = grown(this.#lost, count);
    for (let i = 0; i < count; i++) this.#addresses[i] = this.#memory.hostAddress(gpaOf(gfns.at(i)));
    this.#pinner.discarded(this.#addresses, count, this.#lost);
  }

  /** A domain maps these frames, which are pinned. */
  need(mapping: Mapping): void {
    for (const gfn of framesOf(mapping)) this.ledger.need(gfn);
  }

  /**
   * Domains no longer map these frames. What nobody else wants pinned goes at once, or is `kept` as frames are that no
   * table ever claimed. Returns how many went.
   */
  giveUp(mappings: Iterable<Mapping>, kept: boolean): number {
    const gone: Gfn[] = [];
    for (const mapping of mappings)
      for (const gfn of framesOf(mapping)) {
        this.ledger.giveUp(gfn);
        if (this.ledger.isNeeded(gfn) || this.ledger.generation(gfn) !== ONLY_DOMAINS) continue;
        if (kept) this.ledger.claim(gfn, NO_TABLE);
        else gone.push(gfn);
      }
    this.drop(gone);
    return gone.length;
  }

  /** Frames that must go, whatever becomes of their pins: no longer RAM, or of a machine that was reset. */
  drop(gfns: readonly Gfn[]): void {
    for (const gfn of gfns) {
      this.#iommu.revoke(gfn);
      this.#extents.abandon(gfn, this.ledger.remove(gfn));
      this.tried(gfn, "gone", this.#clock.now());
    }
    this.releaseOrphans();
  }

  releaseOrphans(): void {
    if (this.abandoned > 0 && this.#iommu.quiesce()) this.#extents.releaseOrphans();
  }
}
