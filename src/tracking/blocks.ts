import { HostError, invariant } from "../base/errors.ts";
import { grown } from "../base/frame-index.ts";
import { FRAME_SIZE, type Gfn, gpaOf } from "../base/units.ts";
import type { GuestMemory, GuestRegion } from "../memory/guest-memory.ts";
import type { GfnBuffer } from "../policy/policy.ts";
import { BLOCK_FRAMES, Block, type MappedRun } from "./block.ts";
import type { FramePins, OrphanRange } from "./frame-pins.ts";
import type { Ledger } from "./ledger.ts";
import type { Pinner } from "./pinner.ts";

/** Blocks that one slice of collectOrphans() looks at. */
const SLICE_BLOCKS = 64;

/** Frames [from, to) of one region, to be pinned as one. */
interface Run {
  readonly from: number;
  readonly to: number;
  readonly region: GuestRegion;
  /** Only if all have memory. */
  readonly present: boolean;
}

interface BlocksOptions {
  readonly memory: GuestMemory;
  readonly pinner: Pinner;
  readonly ledger: Ledger;
  /** Frames that the quota has room for. */
  room(): number;
  /** Whether a frame may be pinned that nobody has asked for. */
  mayPin(gfn: Gfn): boolean;
}

/**
 * Pins of a host that maps each page once and takes only so many mappings, as an IOMMU behind VFIO (type 1: 65,535). A
 * mapping cannot be split, nor replaced by a larger one while a device uses it. So
 *
 * - frames that follow each other, and that are pinned together, are one mapping, within an aligned block of 2 MiB;
 * - it grows into the hole around it when the aligned block that it then fills, of 2 MiB or less, is mostly in use, and a
 *   quarter of it was before: so what is hot ends as few mappings. Only frames that have memory are taken along;
 * - with more than half of the mappings taken it grows so far that the others suffice for all RAM that is left, whether
 *   that has memory or not;
 * - a frame that is unpinned leaves the ledger, and its P, at once. Its page stays pinned until its mapping has no frame
 *   in the ledger: it is an orphan, counted as pinned, and a frame that is pinned again takes it over.
 *
 * An orphan's page may be discarded, or its frame get other memory: it is never taken over then (EBUSY).
 */
export class Blocks implements FramePins {
  readonly #o: BlocksOptions;
  readonly #blocks = new Map<number, Block>();
  readonly #byHandle = new Map<number, MappedRun>();
  /** Handles of mappings of no frame, which the host has not let go of yet. */
  readonly #idle = new Set<number>();
  #pages = 0;
  #lastBlock = -1;
  #addresses = new Float64Array(BLOCK_FRAMES);
  #lengths = new Float64Array(256);
  #gpas = new Float64Array(256);
  #handles = new Int32Array(256);
  #lost = new Uint8Array(BLOCK_FRAMES);

  constructor(options: BlocksOptions) {
    this.#o = options;
  }

  get orphans(): number {
    return this.#pages - this.#o.ledger.size;
  }
  get abandoned(): number {
    let pages = 0;
    for (const handle of this.#idle) pages += this.#byHandle.get(handle)!.count;
    return pages;
  }
  get mappings(): number {
    return this.#byHandle.size;
  }

  covers(gfn: Gfn): boolean {
    return this.#find(gfn) !== undefined;
  }

  pin(gfns: readonly Gfn[], pinned: (gfn: Gfn, handle: number) => void, present = false): void {
    const fresh = this.#fresh(gfns);
    if (fresh.length > 0)
      this.#map(
        fresh.sort((a, b) => a - b),
        present,
      );
    for (const gfn of gfns) {
      const run = this.#find(gfn)!;
      run.needed++;
      this.#blockOf(gfn)!.setNeeded(gfn, true);
      this.#idle.delete(run.handle);
      pinned(gfn, run.handle);
    }
  }

  adopt(
    pages: Iterable<readonly [gfn: Gfn, handle: number]>,
    pinned: (gfn: Gfn, handle: number) => void,
  ): void {
    const byHandle = Map.groupBy(pages, ([, handle]) => handle);
    for (const [handle, of] of byHandle) {
      const first = of[0]![0];
      this.#enter(first, of.length, handle);
      for (const [gfn] of of) {
        this.#byHandle.get(handle)!.needed++;
        this.#blockOf(gfn)!.setNeeded(gfn, true);
        pinned(gfn, handle);
      }
    }
  }

  abandon(gfn: Gfn, handle: number): void {
    const run = this.#byHandle.get(handle)!;
    this.#leaves(run, gfn);
    if (run.needed === 0) this.#idle.add(handle);
  }

  /** What is discarded is not split off: it becomes an orphan. */
  addDiscarded(): void {}

  release(gfns: GfnBuffer): ReadonlySet<number> {
    const groups = new Map<MappedRun, Gfn[]>();
    for (let i = 0; i < gfns.length; i++) {
      const run = this.#byHandle.get(this.#o.ledger.handle(gfns.at(i)))!;
      const group = groups.get(run);
      if (group) group.push(gfns.at(i));
      else groups.set(run, [gfns.at(i)]);
    }
    const gone = new Set<number>();
    const whole: MappedRun[] = [];
    for (const [run, going] of groups) {
      if (run.needed === going.length) {
        whole.push(run);
        continue;
      }
      gone.add(run.handle);
      for (const gfn of going) this.#leaves(run, gfn);
    }
    for (const run of this.#releaseWhole(whole)) gone.add(run.handle);
    return gone;
  }

  releaseOrphans(): void {
    this.#releaseWhole([...this.#idle].map((handle) => this.#byHandle.get(handle)!));
  }

  collectOrphans({ first, end, discarded }: OrphanRange, from: number, out: Gfn[]): number | null {
    const last = Math.min(this.#lastBlock, Math.ceil(end / BLOCK_FRAMES) - 1);
    let number = Math.max(from, Math.floor(first / BLOCK_FRAMES));
    for (let n = 0; number <= last && n < SLICE_BLOCKS; number++) {
      const block = this.#blocks.get(number);
      if (!block) continue;
      n++;
      for (const run of block.runs) {
        const orphans = this.#orphansOf(run, block).filter((gfn) => gfn >= first && gfn < end);
        out.push(...(discarded ? this.#findStale(run, orphans) : orphans));
      }
    }
    return number <= last ? number : null;
  }

  /** Those of `gfns` that no mapping has. Throws HostError for one whose page is stale. */
  #fresh(gfns: readonly Gfn[]): Gfn[] {
    const fresh: Gfn[] = [];
    const again = new Map<MappedRun, Gfn[]>();
    for (const gfn of gfns) {
      const run = this.#find(gfn);
      if (!run) fresh.push(gfn);
      else if (again.has(run)) again.get(run)!.push(gfn);
      else again.set(run, [gfn]);
    }
    for (const [run, of] of again) {
      const [stale] = this.#findStale(run, of);
      if (stale === undefined) continue;
      const detail = `frame ${stale} has lost the page that is pinned for it, and others are in use with it`;
      throw new HostError("pin", "EBUSY", detail);
    }
    return fresh;
  }

  /** Throws HostError; then nothing is mapped. */
  #map(fresh: readonly Gfn[], present: boolean): void {
    const runs = present ? this.#exactly(fresh, true) : this.#grown(fresh);
    try {
      this.#pin(runs);
    } catch (error) {
      const pages = runs.reduce((sum, { from, to }) => sum + to - from, 0);
      if (!(error instanceof HostError) || error.errno === "ENOSPC" || pages === fresh.length) throw error;
      this.#pin(this.#exactly(fresh, false));
    }
  }

  #pin(runs: readonly Run[]): void {
    this.#addresses = grown(this.#addresses, runs.length);
    this.#lengths = grown(this.#lengths, runs.length);
    this.#gpas = grown(this.#gpas, runs.length);
    this.#handles = grown(this.#handles, runs.length);
    for (const [i, { from, to, region, present }] of runs.entries()) {
      const gpa = gpaOf(from as Gfn);
      const base = (present ? region.presentAddress : undefined) ?? region.hostAddress;
      this.#addresses[i] = base + (gpa - region.gpa);
      this.#lengths[i] = (to - from) * FRAME_SIZE;
      this.#gpas[i] = gpa;
    }
    this.#o.pinner.pin(this.#addresses, runs.length, this.#handles, this.#lengths, this.#gpas);
    for (const [i, { from, to }] of runs.entries()) this.#enter(from as Gfn, to - from, this.#handles[i]!);
  }

  /** Frames that follow each other, in ascending order, as one run where they may be. */
  #exactly(fresh: readonly Gfn[], present: boolean): Run[] {
    const runs: Run[] = [];
    for (let i = 0; i < fresh.length; ) {
      const from = fresh[i]!;
      const region = this.#o.memory.find(gpaOf(from), FRAME_SIZE)!;
      const limit = Math.min(boundaryAfter(from), Math.floor((region.gpa + region.size) / FRAME_SIZE));
      let to: number = from;
      for (; to < limit && fresh[i] === to; i++) to++;
      runs.push({ from, to, region, present });
    }
    return runs;
  }

  /** The same, each as large as is worth it. */
  #grown(fresh: readonly Gfn[]): Run[] {
    const exact = this.#exactly(fresh, false);
    const grain = this.#grain;
    let room = Math.floor((this.#o.room() - fresh.length) / 2);
    const runs: Run[] = [];
    let done = 0;
    for (const [i, run] of exact.entries()) {
      // A part of it may be in the one before, which has grown.
      const from = Math.max(run.from, done);
      if (from >= run.to) continue;
      const larger = this.#larger({ ...run, from }, done, exact[i + 1]?.from, grain);
      const extra = larger.to - larger.from - (run.to - from);
      const chosen = extra <= room && this.#mayTake(larger, from, run.to) ? larger : { ...run, from };
      if (chosen === larger) room -= extra;
      runs.push(chosen);
      done = chosen.to;
    }
    return runs;
  }

  /** Frames that a mapping should have, so that the mappings that are left suffice: a power of two. */
  get #grain(): number {
    const { pinner, memory } = this.#o;
    const { pinsMax, pinsLeft } = pinner;
    if (pinsMax === undefined || pinsLeft === undefined || 2 * pinsLeft > pinsMax) return 1;
    const unpinned = memory.size / FRAME_SIZE - this.#pages;
    let grain = 1;
    while (grain < BLOCK_FRAMES && grain * pinsLeft < unpinned) grain *= 2;
    return grain;
  }

  /** Up to `next`, where the next run of the request begins, and from `done`, where the last one has ended. */
  #larger(run: Run, done: number, next: number | undefined, grain: number): Run {
    const { from, to, region } = run;
    const block = this.#blockOf(from as Gfn) ?? new Block(Math.floor(from / BLOCK_FRAMES));
    const hole = block.hole(from as Gfn);
    const low = Math.max(hole[0], done, Math.ceil(region.gpa / FRAME_SIZE));
    const high = Math.min(hole[1], next ?? hole[1], Math.floor((region.gpa + region.size) / FRAME_SIZE));
    const within = (first: number, size: number): Run => ({
      ...run,
      from: Math.max(low, first),
      to: Math.min(high, first + size),
    });
    const first = from - (from % grain);
    const coarse = within(first, Math.ceil((to - first) / grain) * grain);
    for (let size = BLOCK_FRAMES; size > to - from; size /= 2) {
      const start = from - (from % size);
      if (to > start + size) break;
      const hot = block.neededIn(start, size);
      if (4 * hot < size || 2 * (hot + to - from) <= size) continue;
      const busy = { ...within(start, size), present: true };
      if (busy.to - busy.from > coarse.to - coarse.from && this.#hasMemory(busy)) return busy;
      break;
    }
    return coarse;
  }

  #mayTake(larger: Run, from: number, to: number): boolean {
    for (let gfn = larger.from; gfn < larger.to; gfn++)
      if ((gfn < from || gfn >= to) && !this.#o.mayPin(gfn as Gfn)) return false;
    return true;
  }

  #hasMemory({ from, to, region }: Run): boolean {
    if (region.presentAddress === undefined) return false;
    const gfns = Array.from({ length: to - from }, (_, i) => (from + i) as Gfn);
    try {
      return this.#withoutMemory(gfns).length === 0;
    } catch (error) {
      if (!(error instanceof HostError)) throw error;
      return false;
    }
  }

  /** Those of `gfns`, frames of one mapping, that are stale by now. Throws HostError. */
  #findStale(run: MappedRun, gfns: readonly Gfn[]): Gfn[] {
    const moved = (gfn: Gfn) => {
      const region = this.#o.memory.find(gpaOf(gfn), FRAME_SIZE);
      const pinned = run.hostAddress + (gfn - run.first) * FRAME_SIZE;
      return !region || region.hostAddress + (gpaOf(gfn) - region.gpa) !== pinned;
    };
    const [other, same] = [gfns.filter(moved), gfns.filter((gfn) => !moved(gfn))];
    for (const gfn of [...other, ...this.#withoutMemory(same)]) {
      run.stale ??= new Set();
      run.stale.add(gfn);
    }
    return gfns.filter((gfn) => run.stale?.has(gfn));
  }

  /** Throws HostError. */
  #withoutMemory(gfns: readonly Gfn[]): Gfn[] {
    if (gfns.length === 0) return [];
    this.#addresses = grown(this.#addresses, gfns.length);
    this.#lost = grown(this.#lost, gfns.length);
    for (const [i, gfn] of gfns.entries()) this.#addresses[i] = this.#o.memory.hostAddress(gpaOf(gfn));
    this.#o.pinner.discarded(this.#addresses, gfns.length, this.#lost);
    return gfns.filter((_, i) => this.#lost[i] === 1);
  }

  #orphansOf(run: MappedRun, block: Block): Gfn[] {
    const orphans: Gfn[] = [];
    if (run.needed === run.count) return orphans;
    for (let gfn = run.first; gfn < run.first + run.count; gfn++) if (!block.isNeeded(gfn)) orphans.push(gfn);
    return orphans;
  }

  #enter(first: Gfn, count: number, handle: number): void {
    const number = Math.floor(first / BLOCK_FRAMES);
    invariant(first + count <= (number + 1) * BLOCK_FRAMES, `a mapping of ${count} frames at frame ${first}`);
    const region = this.#o.memory.find(gpaOf(first), FRAME_SIZE);
    const hostAddress = region ? region.hostAddress + (gpaOf(first) - region.gpa) : Number.NaN;
    const run: MappedRun = { first, count, handle, hostAddress, needed: 0 };
    if (!this.#blocks.has(number)) this.#blocks.set(number, new Block(number));
    this.#blocks.get(number)!.insert(run);
    this.#byHandle.set(handle, run);
    this.#pages += count;
    this.#lastBlock = Math.max(this.#lastBlock, number);
  }

  /** The frame leaves the ledger. */
  #leaves(run: MappedRun, gfn: Gfn): void {
    run.needed--;
    this.#blockOf(gfn)!.setNeeded(gfn, false);
  }

  /** Returns those that went. */
  #releaseWhole(runs: readonly MappedRun[]): MappedRun[] {
    this.#handles = grown(this.#handles, runs.length);
    for (const [i, run] of runs.entries()) this.#handles[i] = run.handle;
    const gone = runs.slice(0, this.#o.pinner.release(this.#handles, runs.length));
    for (const run of gone) {
      const number = Math.floor(run.first / BLOCK_FRAMES);
      const block = this.#blocks.get(number)!;
      for (let gfn = run.first; gfn < run.first + run.count; gfn++) block.setNeeded(gfn, false);
      block.remove(run);
      if (block.runs.length === 0) this.#blocks.delete(number);
      this.#byHandle.delete(run.handle);
      this.#idle.delete(run.handle);
      this.#pages -= run.count;
    }
    return gone;
  }

  #find(gfn: Gfn): MappedRun | undefined {
    return this.#blockOf(gfn)?.find(gfn);
  }

  #blockOf(gfn: Gfn): Block | undefined {
    return this.#blocks.get(Math.floor(gfn / BLOCK_FRAMES));
  }
}

const boundaryAfter = (gfn: number): number => (Math.floor(gfn / BLOCK_FRAMES) + 1) * BLOCK_FRAMES;
