import { InvariantViolation } from "../base/errors.ts";
import { FrameIndex, grown } from "../base/frame-index.ts";
import type { Gfn } from "../base/units.ts";
import type { GfnBuffer } from "../policy/policy.ts";

/** Generation of frames that no table ever claimed: firmware's. */
export const NO_TABLE = 0;
/** Generation of frames that were pinned for a domain, and that no table has claimed since: they go with their needs. */
export const ONLY_DOMAINS = 0xffff_ffff;
/** Generations of frames that a fault-capable device touched, and that no table has claimed since: it touches them again. */
export const FAULTED = 0xffff_fffe;
/** Since the last unpin pass: as A in a unit. */
export const FAULTED_LATELY = 0xffff_fffd;
/** Generation of frames that the table in use has P for, though the guest has not asked, and is not known to use them. */
export const SPECULATED = 0xffff_fffc;
/** Whether the guest has asked for what has this generation. */
export const isAsked = (generation: number): boolean =>
  generation !== NO_TABLE && (generation < SPECULATED || generation === ONLY_DOMAINS);

type ClaimChanged = (gfn: Gfn, claimed: boolean) => void;

/** Frames of a range that are looked up one by one: a balloon asks for one frame, or for a few, again and again. */
const SMALL_RANGE = 4096;

/**
 * The host's truth about what is pinned for one guest: frame -> handle of the pin, the activation ("generation") whose
 * table last claimed it, and how many mappings of domains need it. Structure of arrays, O(1) per operation, nothing per guest frame.
 */
export class Ledger {
  readonly #frames = new FrameIndex();
  #handles = new Int32Array(0);
  #generations = new Uint32Array(0);
  #needs = new Uint32Array(0);
  #peak = 0;
  #claimed = 0;
  readonly #changed: ClaimChanged;

  /** `changed`: told when the guest begins or ceases to be who asked for a frame that is pinned already. */
  constructor(changed: ClaimChanged = () => {}) {
    this.#changed = changed;
  }

  /** Frames pinned now. */
  get size(): number {
    return this.#frames.size;
  }
  /** Most frames pinned at once. */
  get peak(): number {
    return this.#peak;
  }

  /** Frames that the guest has asked for. */
  get claimed(): number {
    return this.#claimed;
  }

  has(gfn: Gfn): boolean {
    return this.#frames.find(gfn) >= 0;
  }

  /** Returns the frame's slot. */
  add(gfn: Gfn, handle: number, generation: number): number {
    const id = this.#frames.insert(gfn);
    if (id >= this.#handles.length) {
      this.#handles = grown(this.#handles, this.#frames.capacity);
      this.#generations = grown(this.#generations, this.#frames.capacity);
      this.#needs = grown(this.#needs, this.#frames.capacity);
    }
    this.#needs[id] = 0;
    this.#handles[id] = handle;
    this.#generations[id] = generation;
    if (this.#isClaimed(id)) this.#claimed++;
    this.#peak = Math.max(this.#peak, this.#frames.size);
    return id;
  }

  /** Returns the handle of the frame's pin, which the caller has released. */
  remove(gfn: Gfn): number {
    const id = this.#frames.remove(gfn);
    if (id < 0) throw new InvariantViolation(`frame ${gfn} is not in the ledger`);
    if (this.#isClaimed(id)) this.#claimed--;
    return this.#handles[id]!;
  }

  handle(gfn: Gfn): number {
    return this.#handles[this.#idOf(gfn)]!;
  }

  /** The frame has another pin. */
  setHandle(gfn: Gfn, handle: number): void {
    this.#handles[this.#idOf(gfn)] = handle;
  }

  generation(gfn: Gfn): number {
    return this.#generations[this.#idOf(gfn)]!;
  }

  claim(gfn: Gfn, generation: number): void {
    const id = this.#idOf(gfn);
    const before = this.#isClaimed(id);
    this.#generations[id] = generation;
    this.#count(gfn, id, before);
  }

  /** Who had asked for these frames by a table is gone; those that domains need are claimed by them. */
  disown(): void {
    for (const gfn of this.#frames) if (this.isClaimed(gfn) && !this.isNeeded(gfn)) this.claim(gfn, NO_TABLE);
  }

  /** Whether the guest has asked for the frame since it was pinned: by a PIN request, by a MAP, or by using its P. */
  isClaimed(gfn: Gfn): boolean {
    return this.#isClaimed(this.#idOf(gfn));
  }

  /** A frame keeps its slot, below this, while it is pinned: for walks in slices. */
  get slots(): number {
    return this.#frames.ids;
  }

  at(slot: number): Gfn | undefined {
    const gfn = this.#frames.gfn(slot);
    return gfn < 0 ? undefined : gfn;
  }

  /**
   * Frames of [first, end) that a slice of a walk finds, at most `slots`: frame by frame in a small range, in ascending
   * order, else slot by slot. `from` is 0, then what was returned; null at the end.
   */
  collect(first: number, end: number, from: number, slots: number, out: GfnBuffer): number | null {
    if (end - first <= SMALL_RANGE) {
      for (let gfn = first + from; gfn < end; gfn++) {
        if (this.has(gfn as Gfn)) out.push(gfn as Gfn);
        if (out.length === slots) return gfn + 1 < end ? gfn + 1 - first : null;
      }
      return null;
    }
    const to = Math.min(from + slots, this.slots);
    for (let slot = from; slot < to; slot++) {
      const gfn = this.at(slot);
      if (gfn !== undefined && gfn >= first && gfn < end) out.push(gfn);
    }
    return to < this.slots ? to : null;
  }

  /** A mapping of a domain needs the frame. */
  need(gfn: Gfn): void {
    const id = this.#idOf(gfn);
    const before = this.#isClaimed(id);
    this.#needs[id]!++;
    this.#count(gfn, id, before);
  }

  /** A mapping that needed the frame is gone. */
  giveUp(gfn: Gfn): void {
    const id = this.#idOf(gfn);
    if (this.#needs[id] === 0) throw new InvariantViolation(`no domain needs frame ${gfn}`);
    this.#needs[id]!--;
    this.#count(gfn, id, true);
  }

  /** Whether a domain maps the frame. */
  isNeeded(gfn: Gfn): boolean {
    return this.#needs[this.#idOf(gfn)]! > 0;
  }

  frames(): Iterable<Gfn> {
    return this.#frames;
  }

  #isClaimed(id: number): boolean {
    return this.#needs[id]! > 0 || isAsked(this.#generations[id]!);
  }

  #count(gfn: Gfn, id: number, before: boolean): void {
    const claimed = this.#isClaimed(id);
    if (claimed === before) return;
    this.#claimed += claimed ? 1 : -1;
    this.#changed(gfn, claimed);
  }

  #idOf(gfn: Gfn): number {
    const id = this.#frames.find(gfn);
    if (id < 0) throw new InvariantViolation(`frame ${gfn} is not in the ledger`);
    return id;
  }
}
