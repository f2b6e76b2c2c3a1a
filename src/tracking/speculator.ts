import type { Clock } from "../base/clock.ts";
import { HostError } from "../base/errors.ts";
import { FrameIndex } from "../base/frame-index.ts";
import { FRAME_SIZE, type Gfn, gpaOf, type Nanoseconds } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import { FrameQueues } from "../policy/frame-queues.ts";
import { type Claim, GfnBuffer } from "../policy/policy.ts";
import { createSpeculation } from "../policy/speculation/registry.ts";
import { type Asked, CANDIDATES_MAX, type Speculation } from "../policy/speculation/speculation.ts";
import type { TrackingCounters } from "./counters.ts";
import { NO_TABLE, SPECULATED } from "./ledger.ts";
import type { PinObserver, Pins } from "./pins.ts";
import type { TableInUse } from "./table-in-use.ts";

/** Frames that are pinned unasked, and of which nobody knows yet whether the guest uses them: 4 MiB of waste, at most. */
const UNPROVEN_MAX = 1024;
/** Ranges that an operator has had unpinned, which are remembered one by one; and frames that were asked for since. */
const FORBIDDEN_MAX = 64;
const ALLOWED_MAX = 65_536;

export interface SpeculatorOptions {
  readonly memory: GuestMemory;
  readonly pins: Pins;
  readonly table: TableInUse;
  readonly clock: Clock;
  readonly counters: TrackingCounters;
  /** Frames that the quota has room for. */
  room(): number;
  /** Nothing is unpinned now. A driver may then free leaves whose units are zero: no unit may change by itself. */
  parked(): boolean;
  /** Told when it has switched itself off: of the last `judged` frames, the guest has used so many. */
  stopped(used: number, judged: number): void;
}

/**
 * Pins, with what a PIN request asks for, what a speculation takes to be next, so that the guest finds P set and does not
 * ask. Best effort: where the host refuses or the quota leaves no room, nothing comes of it. Such a frame is the
 * table's as soon as the guest is found to have used it, "saved"; unpinned before that, it was "wasted". A speculation
 * that wastes more than it saves switches itself off.
 */
export class Speculator implements PinObserver {
  readonly #o: SpeculatorOptions;
  #speculation: Speculation = createSpeculation("off");
  /** Frames pinned unasked and neither used nor unpinned yet. Count: the `#turn` in which they were. */
  readonly #unproven = new FrameQueues();
  /** Another one since an operator has chosen. */
  #turn = 0;
  /** Of the last frames that were judged, 1 for one that was used; a ring. */
  #verdicts = new Uint8Array(0);
  #forbidden: { readonly first: number; readonly end: number }[] = [];
  readonly #allowed = new FrameIndex();
  // Scratch of a request.
  readonly #candidates = new GfnBuffer(CANDIDATES_MAX);
  readonly #chosen = new FrameIndex();

  constructor(options: SpeculatorOptions) {
    this.#o = options;
  }

  get speculation(): Speculation {
    return this.#speculation;
  }

  /** From now on; what another one has pinned is unpinned like anything that is idle. On, also if it had switched itself off. */
  choose(speculation: Speculation): void {
    this.#speculation = speculation;
    this.restart();
  }

  /** Judge anew. */
  restart(): void {
    this.#turn++;
    this.#forbidden = [];
    this.#allowed.clear();
    this.#verdicts = new Uint8Array(Number(this.#speculation.parameters.judged ?? 0));
    Object.assign(this.#o.counters, { speculationStopped: 0, speculationJudged: 0, speculationUsed: 0 });
  }

  /**
   * Frames that an operator has had unpinned. Their memory may be about to be discarded, and the guest maps none of it, as
   * abi.md section 4 has it: nor may the host pin it anew, until the guest has asked for it.
   */
  forbid(first: number, end: number): void {
    this.#allowed.clear();
    if (this.#forbidden.some((range) => range.first <= first && end <= range.end)) return;
    this.#forbidden.push({ first, end });
    if (this.#forbidden.length <= FORBIDDEN_MAX) return;
    const firsts = this.#forbidden.map((range) => range.first);
    this.#forbidden = [
      { first: Math.min(...firsts), end: Math.max(...this.#forbidden.map((range) => range.end)) },
    ];
  }

  /** A request has come; its frames are not pinned yet, so that a speculation can tell what they were before. */
  expect(asked: Asked): void {
    this.#candidates.clear();
    if (this.#o.counters.speculationStopped || this.#o.parked()) return;
    this.#speculation.candidates(asked, this.#o.clock.now(), this.#candidates);
  }

  /** The request is served. */
  pin(): void {
    if (this.#candidates.length === 0) return;
    const { pins, counters, clock } = this.#o;
    const budget = Number(this.#speculation.parameters.budget);
    this.#look(2 * budget);
    if (counters.speculationStopped) return;
    const gfns = this.#choose(Math.min(budget, this.#room, UNPROVEN_MAX - this.#unproven.size()));
    try {
      pins.pinPresent(gfns, SPECULATED);
    } catch (error) {
      if (!(error instanceof HostError)) throw error;
      return;
    }
    counters.framesPinned += gfns.length;
    counters.framesSpeculative += gfns.length;
    for (const gfn of gfns) {
      this.#unproven.add(gfn, clock.now());
      this.#unproven.setCount(gfn, this.#turn);
    }
    this.#show(gfns);
  }

  pinned(gfn: Gfn, now: Nanoseconds, unasked: boolean): void {
    if (unasked) return;
    if (this.#forbidden.length > 0 && this.#allowed.size < ALLOWED_MAX && this.#allowed.find(gfn) < 0)
      this.#allowed.insert(gfn);
    this.#speculation.pinned(gfn, now);
  }
  used(gfn: Gfn, now: Nanoseconds): void {
    this.#speculation.pinned(gfn, now);
  }

  tried(gfn: Gfn, outcome: Claim, now: Nanoseconds): void {
    this.#speculation.tried(gfn, outcome, now);
    if (!this.#unproven.has(gfn)) return;
    if (outcome === "claimed") this.#settle(gfn, false);
    else if (outcome === "gone") this.#unproven.remove(gfn);
  }

  /** The guest has used a frame that was pinned unasked; for its table it is one that it has claimed. */
  noticed(gfn: Gfn): void {
    if (this.#unproven.has(gfn)) this.#settle(gfn, true);
    this.#o.pins.tellUsed(gfn, this.#o.clock.now());
  }

  /** PIN goes off, or another table comes: what is not known to be used by now is nobody's, as what firmware has left. */
  tableCloses(): void {
    const { table, pins } = this.#o;
    for (let gfn = this.#unproven.oldest(); gfn !== undefined; gfn = this.#unproven.oldest()) {
      if (table.noticeUse(gfn)) continue;
      pins.ledger.claim(gfn, NO_TABLE);
      this.#unproven.remove(gfn);
    }
  }

  /** The guest's own requests are to find room: not all that the quota leaves. */
  get #room(): number {
    return Math.floor(this.#o.room() / 2);
  }

  /** See of the oldest frames, and then of others, whether the guest has used them. */
  #look(frames: number): void {
    const now = this.#o.clock.now();
    for (let n = Math.min(frames, this.#unproven.size()); n > 0; n--) {
      const gfn = this.#unproven.oldest()!;
      if (!this.#o.table.noticeUse(gfn)) this.#unproven.move(gfn, now);
    }
  }

  /** The likeliest candidates that may be pinned, ascending. */
  #choose(framesMax: number): Gfn[] {
    const { pins } = this.#o;
    this.#chosen.clear();
    this.#candidates.keep((i) => {
      const gfn = this.#candidates.at(i);
      if (this.#chosen.size >= framesMax || this.#chosen.find(gfn) >= 0 || !this.#isQuiet(gfn)) return false;
      this.#chosen.insert(gfn);
      return true;
    });
    try {
      pins.dropDiscarded(this.#candidates);
    } catch (error) {
      if (!(error instanceof HostError)) throw error;
      return [];
    }
    return Array.from({ length: this.#candidates.length }, (_, i) => this.#candidates.at(i)).sort(
      (a, b) => a - b,
    );
  }

  /** RAM that is not pinned, that the guest may map, and that it is not about to ask for. */
  #isQuiet(gfn: Gfn): boolean {
    const { memory, pins, table } = this.#o;
    if (pins.ledger.has(gfn) || !memory.find(gpaOf(gfn), FRAME_SIZE)) return false;
    return this.allows(gfn) && table.isQuiet(gfn);
  }

  /** Whether a frame may be pinned that the guest has not asked for: see forbid(). */
  allows(gfn: Gfn): boolean {
    const forbidden = this.#forbidden.some(({ first, end }) => first <= gfn && gfn < end);
    return !forbidden || this.#allowed.find(gfn) >= 0;
  }

  /** Set P, now that the pages are pinned. */
  #show(gfns: readonly Gfn[]): void {
    for (const gfn of gfns) this.#o.table.show(gfn);
  }

  #settle(gfn: Gfn, used: boolean): void {
    const { counters } = this.#o;
    const mine = this.#unproven.count(gfn) === this.#turn;
    this.#unproven.remove(gfn);
    if (used) counters.speculationSaved++;
    else counters.speculationWasted++;
    if (mine) this.#judge(used);
  }

  #judge(used: boolean): void {
    const { counters, stopped } = this.#o;
    const { length } = this.#verdicts;
    if (length === 0 || counters.speculationStopped) return;
    const at = counters.speculationJudged++ % length;
    counters.speculationUsed += Number(used) - this.#verdicts[at]!;
    this.#verdicts[at] = Number(used);
    if (counters.speculationJudged < length || 2 * counters.speculationUsed >= length) return;
    counters.speculationStopped = 1;
    stopped(counters.speculationUsed, length);
  }
}
