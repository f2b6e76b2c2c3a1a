import { HostError } from "../base/errors.ts";
import { FRAME_SIZE, type Gfn } from "../base/units.ts";
import type { Pinner } from "../tracking/pinner.ts";
import { frameAsPlace } from "./stepped-memory.ts";
import { step, type Turn } from "./turn.ts";

/** Where the host has guest frame 0 mapped: a number to compute with, which nobody follows. */
export const HOST_BASE = 0x7f00_0000_0000;

/** What the fake kernel does next: grant, or refuse with an errno. */
export interface HostFaults {
  pin(): string | undefined;
  release(): boolean;
}

/** What the fake kernel tells, at the moment at which it happens. */
export interface HostObserver {
  pinned(gfn: Gfn): void;
  released(gfn: Gfn): void;
}

/** The host's kernel: pins pages one step at a time, refuses as it is told, and survives the backend. */
export class FakeHost implements Pinner {
  readonly name = "model";
  readonly kernelSource = "none";
  /** Frames by the handle of their pin. */
  readonly pages = new Map<number, Gfn>();
  /** Pins that were refused. */
  failures = 0;
  readonly #pins = new Map<Gfn, number>();
  readonly #holes = new Set<Gfn>();
  /** Handles of pins whose page has been discarded. */
  readonly #stale = new Set<number>();
  readonly #faults: HostFaults;
  readonly #observer: HostObserver;
  #turn: Turn;
  #next = 0;

  constructor(turn: Turn, faults: HostFaults, observer: HostObserver) {
    this.#turn = turn;
    this.#faults = faults;
    this.#observer = observer;
  }

  holds(gfn: number): boolean {
    return (this.#pins.get(gfn as Gfn) ?? 0) > 0;
  }

  /** The memory of a frame is discarded; a pin keeps the page that was there. */
  discard(gfn: Gfn): void {
    this.#holes.add(gfn);
    for (const [handle, frame] of this.pages) if (frame === gfn) this.#stale.add(handle);
  }

  /** The guest uses a frame: it gets memory, if it has none. */
  touch(gfn: Gfn): void {
    this.#holes.delete(gfn);
  }

  /** Whether the page that the guest sees is pinned. */
  holdsPresent(gfn: number): boolean {
    for (const [handle, frame] of this.pages) if (frame === gfn && !this.#stale.has(handle)) return true;
    return false;
  }

  pin(addresses: Float64Array, count: number, handles: Int32Array): void {
    for (let i = 0; i < count; i++) {
      const place = frameAsPlace((addresses[i]! - HOST_BASE) / FRAME_SIZE);
      const errno = step(this.#turn, "pin", () => this.#faults.pin(), place);
      if (errno === undefined) handles[i] = this.#pin(addresses[i]!);
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
      const place = frameAsPlace(this.pages.get(handles[i]!)!);
      if (!step(this.#turn, "release", () => this.#faults.release(), place)) return i;
      this.#release(handles[i]!);
    }
    return count;
  }

  discarded(addresses: Float64Array, count: number, out: Uint8Array): void {
    for (let i = 0; i < count; i++) {
      const gfn = ((addresses[i]! - HOST_BASE) / FRAME_SIZE) as Gfn;
      out[i] = step(this.#turn, "look", () => Number(this.#holes.has(gfn)), frameAsPlace(gfn));
    }
  }

  kernelPinnedPages(): number {
    return this.pages.size;
  }

  close(): void {}

  #pin(address: number): number {
    const gfn = ((address - HOST_BASE) / FRAME_SIZE) as Gfn;
    this.pages.set(this.#next, gfn);
    this.#pins.set(gfn, (this.#pins.get(gfn) ?? 0) + 1);
    this.#holes.delete(gfn);
    this.#observer.pinned(gfn);
    return this.#next++;
  }

  #release(handle: number): void {
    const gfn = this.pages.get(handle)!;
    this.pages.delete(handle);
    this.#stale.delete(handle);
    this.#pins.set(gfn, this.#pins.get(gfn)! - 1);
    if (!this.holds(gfn)) this.#observer.released(gfn);
  }
}
