import { HostError } from "../../src/base/errors.ts";
import type { Pinner } from "../../src/tracking/pinner.ts";
import { PRESENT } from "./guest.ts";

/** A host that pins in memory only, with faults: what the real pinners may do to the tracker. */
export class FakePinner implements Pinner {
  readonly name = "fake";
  readonly kernelSource = "none";
  /** Number -> host address of a page; the handle of a pin is the number of its first page. */
  readonly pages = new Map<number, number>();
  /** Handle -> pages of the pin. */
  readonly #pins = new Map<number, number>();
  /** Host addresses of pages whose memory has been discarded since. */
  readonly holes = new Set<number>();
  readonly extents: { address: number; length: number }[] = [];
  /** Pages that may be pinned at once; a request beyond it fails at its first page too many. */
  pagesMax = Number.POSITIVE_INFINITY;
  /** At the limit, extents can be split all the same. */
  splitsFree = false;
  /** errno of that failure. */
  errno = "ENOMEM";
  /** Releases that are granted before one is refused. */
  releasesMax = Number.POSITIVE_INFINITY;
  /** Called before each page is pinned or released. */
  before: (what: "pin" | "release") => void = () => {};
  #next = 0;

  isPinned(address: number): boolean {
    return [...this.pages.values()].includes(address);
  }

  /** Of each pinned page, in the order of their pins. */
  *handles(): Generator<readonly [address: number, handle: number]> {
    for (const [handle, pages] of this.#pins)
      for (let i = 0; i < pages; i++) yield [this.pages.get(handle + i)!, handle];
  }

  /** As if the process that made these pins had left them to this one. */
  inherit(from: FakePinner): void {
    for (const [page, address] of from.pages) this.pages.set(page, address);
    for (const [handle, pages] of from.#pins) this.#pins.set(handle, pages);
    this.#next = Math.max(this.#next, from.#next);
  }

  pin(addresses: Float64Array, count: number, handles: Int32Array, pages?: Int32Array): void {
    for (let i = 0; i < count; i++) {
      const count = pages?.[i] ?? 1;
      handles[i] = this.#next;
      this.#pins.set(handles[i]!, count);
      for (let page = 0; page < count; page++) {
        this.before("pin");
        const present = addresses[i]! >= PRESENT;
        const address = (addresses[i]! % PRESENT) + page * 4096;
        const full = this.pages.size >= this.pagesMax && !(this.splitsFree && present);
        if (full || (present && this.holes.has(address))) {
          for (let j = 0; j <= i; j++) this.#unpin(handles[j]!);
          throw new HostError("pin", full ? this.errno : "EFAULT");
        }
        this.pages.set(this.#next++, address);
        this.holes.delete(address);
      }
    }
  }

  pinExtent(address: number, length: number): number {
    if (this.extents.length >= this.pagesMax) throw new HostError("pin", this.errno);
    this.extents.push({ address, length });
    return this.#next++;
  }

  release(handles: Int32Array, count: number): number {
    for (let i = 0; i < count; i++) {
      this.before("release");
      if (this.releasesMax-- <= 0) return i;
      if (!this.#pins.has(handles[i]!)) throw new Error(`handle ${handles[i]} is released twice`);
      this.#unpin(handles[i]!);
    }
    return count;
  }

  #unpin(handle: number): void {
    for (let i = 0; i < this.#pins.get(handle)!; i++) this.pages.delete(handle + i);
    this.#pins.delete(handle);
  }

  discarded(addresses: Float64Array, count: number, out: Uint8Array): void {
    for (let i = 0; i < count; i++) out[i] = Number(this.holes.has(addresses[i]!));
  }

  kernelPinnedPages(): number {
    return this.pages.size;
  }

  close(): void {
    this.pages.clear();
    this.#pins.clear();
  }
}

/** A host behind an IOMMU, as VFIO's type 1: a page has one mapping, which goes as a whole, and their number is limited. */
export class FakeIommuPinner extends FakePinner {
  readonly mapsOnce = true;
  pinsMax = 65_535;
  /** Handle -> frames that the mapping has. */
  readonly mappings = new Map<number, readonly number[]>();
  readonly #mapped = new Set<number>();
  /** Ranges that were released, each with one call. */
  unmaps = 0;

  get pinsNow(): number {
    return this.mappings.size;
  }
  get pinsLeft(): number {
    return this.pinsMax - this.pinsNow;
  }

  /** Frames that devices reach. */
  maps(gfn: number): boolean {
    return this.#mapped.has(gfn);
  }

  override pin(
    addresses: Float64Array,
    count: number,
    handles: Int32Array,
    pages?: Int32Array,
    gfns?: Int32Array,
  ): void {
    if (!pages || !gfns) throw new Error("an IOMMU is to be told where pages go");
    if (count > this.pinsLeft) throw new HostError("pin", "ENOSPC");
    const wanted = Array.from({ length: count }, (_, i) =>
      Array.from({ length: pages[i]! }, (_, page) => gfns[i]! + page),
    );
    if (wanted.some((frames) => frames.length === 0)) throw new Error("a mapping of no page");
    const all = wanted.flat();
    if (new Set(all).size < all.length || all.some((gfn) => this.#mapped.has(gfn)))
      throw new HostError("pin", "EEXIST");
    super.pin(addresses, count, handles, pages);
    for (const [i, gfns] of wanted.entries()) {
      this.mappings.set(handles[i]!, gfns);
      for (const gfn of gfns) this.#mapped.add(gfn);
    }
  }

  override release(handles: Int32Array, count: number, adjoins?: Uint8Array): number {
    for (let i = 1; i < count; i++) if (adjoins?.[i]) this.#checkAdjoins(handles[i - 1]!, handles[i]!);
    const released = super.release(handles, count);
    for (let i = 0; i < released; i++) if (!adjoins?.[i]) this.unmaps++;
    for (const handle of handles.subarray(0, released)) {
      for (const gfn of this.mappings.get(handle)!) this.#mapped.delete(gfn);
      this.mappings.delete(handle);
    }
    return released;
  }

  #checkAdjoins(before: number, handle: number): void {
    const end = this.mappings.get(before)!.at(-1)! + 1;
    const first = this.mappings.get(handle)![0]!;
    if (first < end) throw new Error(`frame ${first} does not follow frame ${end - 1}`);
    for (let gfn = end; gfn < first; gfn++)
      if (this.#mapped.has(gfn)) throw new Error(`frame ${gfn} is mapped between ${end - 1} and ${first}`);
  }
}
