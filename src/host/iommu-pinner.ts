import { HostError, InvariantViolation, invariant } from "../base/errors.ts";
import { FrameIndex, grown } from "../base/frame-index.ts";
import type { Pinner } from "../tracking/pinner.ts";
import { withoutMemory } from "./discarded.ts";
import { canExceedMemlock, memlockLimit } from "./limits.ts";
import { StatusField } from "./process-status.ts";

const PAGE_SIZE = 4096;
/** Pages of one mapping: 1 GiB. */
const EXTENT_MAX = 2 ** 18;
/** Handles are frame numbers, 31 bits: guests of up to 8 TiB. Integers of a CPU, and so are lengths in pages. */
const HANDLE_LIMIT = 2 ** 31;

/** Where the kernel does not say what can be mapped. */
const ALL = Float64Array.of(0, Number.POSITIVE_INFINITY);

/** What the kernel says of the addresses of an IOMMU's domain. */
export interface IovaLimits {
  /** Start and last byte of what can be mapped, in pairs, ascending; undefined: the kernel does not say. */
  readonly ranges: Float64Array | undefined;
  /** Mappings that there is room for; undefined: no limit. */
  readonly room: number | undefined;
  /** In bytes. */
  readonly smallestPage: number;
}

/** An IOMMU's domain, as the kernel gives it to a process. All throw HostError, and have done nothing then. */
export interface IovaSpace {
  readonly name: string;
  /** Where the kernel counts what is mapped. */
  readonly kernelSource: "VmLck" | "VmPin";
  /** The system call that maps, for errors. */
  readonly mapCall: string;
  /** What limits the number of mappings, for errors. */
  readonly roomIs?: string;
  limits(): IovaLimits;
  /** Pin pages of this process, up to 1 GiB, and let devices read and write them at the IOVA of a frame (< 2^31). */
  map(address: number, gfn: number, pages: number): void;
  /** Unmap the mappings that lie in `pages` (< 2^31) from a frame on, all of each; how many bytes they had. */
  unmap(gfn: number, pages: number): number;
  /** Unmap all at once, or undefined where the kernel has no such call; how many bytes they had. */
  unmapAll(): number | undefined;
}

/**
 * Pins by mapping pages for an IOMMU, at the IOVA that is their GPA. What is pinned as one is one mapping of the kernel,
 * and its handle is the GFN of its first page. The kernel charges the pages to the memlock limit unless the process
 * has CAP_IPC_LOCK.
 */
export class IommuPinner implements Pinner {
  readonly name: string;
  readonly kernelSource: "VmLck" | "VmPin";
  readonly mapsOnce = true;
  readonly pinsMax: number | undefined;
  readonly #space: IovaSpace;
  #ranges: Float64Array | undefined;
  /** Frames of the range that was used last. */
  #from = 0;
  #end = 0;
  /** Mappings that there may be. */
  #room: number | undefined;
  /** The first frame of each mapping, and by its id how many pages that has. */
  readonly #first = new FrameIndex();
  #pages = new Int32Array(16);
  readonly #counted: StatusField;
  readonly #countedBefore: number;

  constructor(space: IovaSpace) {
    this.#space = space;
    this.name = space.name;
    this.kernelSource = space.kernelSource;
    if (this.#look() > PAGE_SIZE)
      throw this.#error("EINVAL", "the pages of this IOMMU are larger than 4 KiB");
    this.pinsMax = this.#room;
    this.#counted = new StatusField(space.kernelSource);
    this.#countedBefore = this.#counted.read();
  }

  get pinsNow(): number {
    return this.#first.size;
  }

  /** As far as nobody else maps there. */
  get pinsLeft(): number | undefined {
    return this.#room === undefined ? undefined : this.#room - this.#first.size;
  }

  pin(
    addresses: Float64Array,
    count: number,
    handles: Int32Array,
    pages?: Int32Array,
    gfns?: Int32Array,
  ): void {
    invariant(gfns !== undefined, "an IOMMU maps pages at their GPAs");
    for (let i = 0; i < count; i++) this.#check(gfns[i]!, pages === undefined ? 1 : pages[i]!);
    this.#checkRoom(count);
    let done = 0;
    try {
      for (; done < count; done++)
        handles[done] = this.#map(addresses[done]!, gfns[done]!, pages === undefined ? 1 : pages[done]!);
    } catch (error) {
      const released = this.release(handles, done);
      invariant(released === done, `the kernel kept ${done - released} mappings of a failed request`);
      throw error;
    }
  }

  pinExtent(address: number, length: number, gpa: number): number {
    const [gfn, pages] = [gpa / PAGE_SIZE, length / PAGE_SIZE];
    this.#check(gfn, pages);
    this.#checkRoom(1);
    return this.#map(address, gfn, pages);
  }

  /** What is adjoining, and follows each other in `handles`, goes with one call. */
  release(handles: Int32Array, count: number, adjoins?: Uint8Array): number {
    let released = 0;
    while (released < count) {
      const first = handles[released]!;
      let end = first + this.#pagesOf(first);
      let pages = end - first;
      let next = released + 1;
      for (; next < count && (handles[next] === end || adjoins?.[next] === 1); next++) {
        const more = this.#pagesOf(handles[next]!);
        end = handles[next]! + more;
        pages += more;
      }
      try {
        this.#unmapped(this.#space.unmap(first, end - first), pages);
      } catch (error) {
        if (!(error instanceof HostError)) throw error;
        break;
      }
      for (; released < next; released++) this.#first.remove(handles[released]!);
    }
    return released;
  }

  discarded(addresses: Float64Array, count: number, out: Uint8Array): void {
    withoutMemory(addresses, count, out);
  }

  /**
   * What the kernel has counted since this pinner was made: what the process had locked or pinned before is not in it,
   * what it locks or pins by other means later is.
   */
  kernelPinnedPages(): number {
    return (this.#counted.read() - this.#countedBefore) / (PAGE_SIZE / 1024);
  }

  close(): void {
    if (this.#first.size > 0) this.#unmapAll();
    this.#first.clear();
    this.#counted.close();
  }

  /** Ask the kernel anew; how large the IOMMU's smallest page is. */
  #look(): number {
    const { ranges, room, smallestPage } = this.#space.limits();
    this.#ranges = ranges;
    this.#end = 0;
    this.#room = room === undefined ? undefined : room + this.#first.size;
    return smallestPage;
  }

  #map(address: number, gfn: number, pages: number): number {
    try {
      this.#space.map(address, gfn, pages);
    } catch (error) {
      if (error instanceof HostError) throw this.#refused(error.errno, address, gfn, pages);
      throw error;
    }
    const id = this.#first.insert(gfn);
    if (id >= this.#pages.length) this.#pages = grown(this.#pages, this.#first.capacity);
    this.#pages[id] = pages;
    return gfn;
  }

  /** Throws InvariantViolation for what is no mapping. */
  #pagesOf(handle: number): number {
    const id = this.#first.find(handle);
    if (id < 0) throw new InvariantViolation(`handle ${handle} is not pinned`);
    return this.#pages[id]!;
  }

  #unmapped(bytes: number, pages: number): void {
    if (bytes !== pages * PAGE_SIZE)
      throw new InvariantViolation(`the kernel unmapped ${bytes} bytes, where ${pages} pages were mapped`);
  }

  #unmapAll(): void {
    const handles = Int32Array.from(this.#first).sort();
    const pages = handles.reduce((sum, handle) => sum + this.#pagesOf(handle), 0);
    const bytes = this.#space.unmapAll();
    if (bytes !== undefined) this.#unmapped(bytes, pages);
    else {
      const released = this.release(handles, handles.length);
      invariant(released === handles.length, `the kernel kept ${handles.length - released} mappings`);
    }
  }

  /** Throws HostError for what no device could reach there. */
  #check(gfn: number, pages: number): void {
    if (gfn < this.#from || gfn + pages > this.#end || pages <= 0 || pages > EXTENT_MAX)
      this.#findRange(gfn, pages);
  }

  #findRange(gfn: number, pages: number): void {
    if (pages <= 0 || pages > EXTENT_MAX || !Number.isInteger(gfn) || !Number.isInteger(pages))
      throw new InvariantViolation(`${pages} pages at frame ${gfn} are not whole pages, up to 1 GiB`);
    const iova = (gfn < 0 ? gfn + 2 ** 32 : gfn) * PAGE_SIZE;
    if (gfn < 0 || gfn + pages > HANDLE_LIMIT)
      throw this.#error("EINVAL", `IOVA ${hex(iova)} is beyond the 8 TiB that can be pinned`);
    const ranges = this.#ranges ?? ALL;
    for (let i = 0; i < ranges.length; i += 2)
      if (iova >= ranges[i]! && iova + pages * PAGE_SIZE - 1 <= ranges[i + 1]!) {
        this.#from = Math.ceil(ranges[i]! / PAGE_SIZE);
        this.#end = Math.min(HANDLE_LIMIT, Math.floor((ranges[i + 1]! + 1) / PAGE_SIZE));
        return;
      }
    throw this.#error("EINVAL", this.#reserved(ranges, iova, pages * PAGE_SIZE));
  }

  /** `length` bytes at `iova` are not within one of the ranges. */
  #reserved(ranges: Float64Array, iova: number, length: number): string {
    let from = 0;
    for (let i = 0; i < ranges.length && from < iova + length; i += 2) {
      if (ranges[i]! > iova && ranges[i]! > from)
        return `the IOMMU reserves IOVAs ${hex(from)} to ${hex(ranges[i]! - 1)}: no memory of the guest can be there`;
      from = ranges[i + 1]! + 1;
    }
    return `the IOMMU has IOVAs up to ${hex(from - 1)} only: no memory of the guest can be beyond`;
  }

  #checkRoom(count: number): void {
    if (this.#room === undefined || count <= this.#room - this.#first.size) return;
    this.#look();
    if (count > this.pinsLeft!) throw this.#noRoom(count);
  }

  #noRoom(count: number): HostError {
    const left = this.pinsLeft === undefined ? "too few" : `${this.pinsLeft} of ${this.#room}`;
    const limit = this.#space.roomIs ? `: ${this.#space.roomIs}` : "";
    return this.#error("ENOSPC", `${count} more mappings, and ${left} are free${limit}`);
  }

  /** What the kernel has refused, for a person. */
  #refused(errno: string, address: number, gfn: number, pages: number): HostError {
    const gpa = gfn * PAGE_SIZE;
    const length = pages * PAGE_SIZE;
    const what = `IOVAs ${hex(gpa)} to ${hex(gpa + length - 1)}`;
    switch (errno) {
      case "EEXIST":
        for (const own of this.#first)
          if (own < gfn + pages && own + this.#pagesOf(own) > gfn)
            throw new InvariantViolation(`${what} are pinned twice`);
        return this.#error(errno, `somebody else has mapped some of ${what}`);
      case "ENOSPC":
        this.#look();
        return this.#noRoom(1);
      case "ENOMEM":
        return this.#error(
          errno,
          canExceedMemlock() || memlockLimit() === Number.POSITIVE_INFINITY
            ? `the host has no memory for ${length} bytes`
            : `${length} bytes beyond the memlock limit of ${memlockLimit() / 1024} KiB, or the host has no memory`,
        );
      case "EINVAL":
        // A device that was attached since may have ranges of its own.
        this.#look();
        this.#check(gfn, pages);
        return this.#error(errno, `${what} or address ${hex(address)} are not whole pages of this IOMMU`);
      case "EFAULT":
        return this.#error(
          errno,
          `this process has no memory that can be written at ${hex(address)} to ${hex(address + length - 1)}`,
        );
      default:
        return this.#error(errno, what);
    }
  }

  #error(errno: string, detail: string): HostError {
    return new HostError(this.#space.mapCall, errno, detail);
  }
}

const hex = (address: number) => `0x${address.toString(16)}`;
