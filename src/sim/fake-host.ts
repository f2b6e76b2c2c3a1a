import { HostError } from "../base/errors.ts";
import { FRAME_SIZE, type Gfn } from "../base/units.ts";
import type { Pinner } from "../tracking/pinner.ts";
import { frameAsPlace } from "./stepped-memory.ts";
import { step, type Turn, Violation } from "./turn.ts";

/** Where the host has guest frame 0 mapped: a number to compute with, which nobody follows. */
export const HOST_BASE = 0x7f00_0000_0000;
/** From a host address to the same page in the second mapping, GuestRegion.presentAddress. */
export const PRESENT = 2 ** 50;

/** The frame at a host address of either mapping. */
export const frameAt = (address: number): Gfn => (((address % PRESENT) - HOST_BASE) / FRAME_SIZE) as Gfn;

/** What the fake kernel does next: grant, or refuse with an errno. */
export interface HostFaults {
  pin(): string | undefined;
  release(): boolean;
}

/** What the fake kernel tells, at the moment at which it happens. */
export interface HostObserver {
  /** `present`: in the second mapping; `anew`: the frame had been discarded, and the pin has given it memory. */
  pinned(gfn: Gfn, present: boolean, anew: boolean): void;
  released(gfn: Gfn): void;
}

/** One page of a pin. */
export interface PinnedPage {
  readonly gfn: Gfn;
  readonly handle: number;
  /** The frame had been discarded, and the pin has given it memory. */
  readonly anew: boolean;
  /** It has been discarded: the guest sees another one. */
  stale: boolean;
}

/** The host's kernel: pins pages one step at a time, refuses as it is told, and survives the backend. */
export class FakeHost implements Pinner {
  readonly name = "model";
  readonly kernelSource = "none";
  /** As an IOMMU with so many mappings; 0: pages are pinned as often as asked. */
  readonly pinsMax: number | undefined;
  readonly mapsOnce: boolean;
  readonly pages = new Set<PinnedPage>();
  readonly #byHandle = new Map<number, readonly PinnedPage[]>();
  /** Pins that were refused, and of them those for which there was no mapping left. */
  failures = 0;
  exhausted = 0;
  readonly #pins = new Map<Gfn, number>();
  readonly #holes = new Set<Gfn>();
  readonly #faults: HostFaults;
  readonly #observer: HostObserver;
  #turn: Turn;
  #next = 0;

  constructor(turn: Turn, faults: HostFaults, observer: HostObserver, mappings = 0) {
    this.mapsOnce = mappings > 0;
    this.pinsMax = mappings === 0 || mappings === Number.POSITIVE_INFINITY ? undefined : mappings;
    this.#turn = turn;
    this.#faults = faults;
    this.#observer = observer;
  }

  get pinsNow(): number {
    return this.#byHandle.size;
  }
  get pinsLeft(): number | undefined {
    return this.pinsMax === undefined ? undefined : this.pinsMax - this.pinsNow;
  }

  holds(gfn: number): boolean {
    return this.pins(gfn) > 0;
  }

  /** Pins of a frame. */
  pins(gfn: number): number {
    return this.#pins.get(gfn as Gfn) ?? 0;
  }

  /** The memory of a frame is discarded; a pin keeps the page that was there. */
  discard(gfn: Gfn): void {
    this.#holes.add(gfn);
    for (const page of this.pages) if (page.gfn === gfn) page.stale = true;
  }

  /** The guest uses a frame: it gets memory, if it has none. */
  touch(gfn: Gfn): void {
    this.#holes.delete(gfn);
  }

  /** Whether the page that the guest sees is pinned. */
  holdsPresent(gfn: number): boolean {
    for (const page of this.pages) if (page.gfn === gfn && !page.stale) return true;
    return false;
  }

  pin(addresses: Float64Array, count: number, handles: Int32Array, pages?: Int32Array): void {
    for (let i = 0; i < count; i++) {
      const first = frameAt(addresses[i]!);
      const present = addresses[i]! >= PRESENT;
      const frames = pages?.[i] ?? 1;
      const refusal = () => {
        for (let gfn = first; gfn < first + frames; gfn++) {
          if (this.mapsOnce && this.holds(gfn)) throw new Violation(`frame ${gfn} is mapped a second time`);
          if (present && !this.hasMemory(gfn as Gfn)) return "EFAULT";
        }
        if (this.pinsLeft === 0) {
          this.exhausted++;
          return "ENOSPC";
        }
        return this.#faults.pin();
      };
      const errno = step(this.#turn, "pin", refusal, frameAsPlace(first));
      if (errno === undefined) handles[i] = this.#pin(first, frames, present);
      else {
        this.failures++;
        for (let j = 0; j < i; j++) this.#release(handles[j]!);
        throw new HostError("pin", errno);
      }
    }
  }

  /** Static pins have no part in what is simulated. */
  pinExtent(): never {
    throw new HostError("pin", "ENOSYS");
  }

  release(handles: Int32Array, count: number): number {
    for (let i = 0; i < count; i++) {
      const place = frameAsPlace(this.#byHandle.get(handles[i]!)![0]!.gfn);
      if (!step(this.#turn, "release", () => this.#faults.release(), place)) return i;
      this.#release(handles[i]!);
    }
    return count;
  }

  discarded(addresses: Float64Array, count: number, out: Uint8Array): void {
    for (let i = 0; i < count; i++) {
      const gfn = frameAt(addresses[i]!);
      out[i] = step(this.#turn, "look", () => Number(this.#holes.has(gfn)), frameAsPlace(gfn));
    }
  }

  kernelPinnedPages(): number {
    return this.pages.size;
  }

  close(): void {}

  /** As a fault in the second mapping sees it. */
  protected hasMemory(gfn: Gfn): boolean {
    return !this.#holes.has(gfn);
  }

  #pin(first: number, frames: number, present: boolean): number {
    const handle = this.#next++;
    const pages = Array.from({ length: frames }, (_, i): PinnedPage => {
      const gfn = (first + i) as Gfn;
      return { gfn, handle, anew: this.#holes.delete(gfn), stale: false };
    });
    this.#byHandle.set(handle, pages);
    for (const page of pages) {
      this.pages.add(page);
      this.#pins.set(page.gfn, this.pins(page.gfn) + 1);
      this.#observer.pinned(page.gfn, present, page.anew);
    }
    return handle;
  }

  #release(handle: number): void {
    const pages = this.#byHandle.get(handle)!;
    this.#byHandle.delete(handle);
    for (const page of pages) {
      this.pages.delete(page);
      this.#pins.set(page.gfn, this.pins(page.gfn) - 1);
      if (!this.holds(page.gfn)) this.#observer.released(page.gfn);
    }
  }
}
