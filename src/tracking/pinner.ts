/** The host's page pins. Implemented by host/ (io_uring, VFIO, …), by a software stand-in, and by the simulator's model. */
export interface Pinner {
  /** As in `--pinner` and in results: "io_uring", "software". */
  readonly name: string;

  /**
   * True for an IOMMU: a page is pinned by the mapping of its IOVA, which is its GPA, so no page is pinned twice at once,
   * and what is pinned as one is released as one.
   */
  readonly mapsOnce?: boolean;
  /** Mappings of an IOMMU now. */
  readonly pinsNow?: number;
  /** Pins that the kernel allows at once, whatever their lengths, and how many more it has room for now; undefined: no limit. */
  readonly pinsMax?: number | undefined;
  readonly pinsLeft?: number | undefined;

  /**
   * Pin one 4 KiB page, or `pages[i]` of them, at each of the first `count` virtual addresses, for reading and writing,
   * and store a handle (>= 0) for each. An IOMMU maps them at the frames from `gfns[i]` on, which others ignore. All or
   * nothing: on HostError nothing is newly pinned. ENOSPC: no more pins; ENOMEM: memory, or the memlock limit.
   */
  pin(
    addresses: Float64Array,
    count: number,
    handles: Int32Array,
    pages?: Int32Array,
    gfns?: Int32Array,
  ): void;

  /** Pin `length` bytes (whole pages, at most 1 GiB) at `address` as one, at `gpa`; returns its handle. Throws HostError. */
  pinExtent(address: number, length: number, gpa: number): number;

  /**
   * Release the first `count` handles, in order. Returns how many were released: fewer than `count` when the host
   * refused one, which then stays pinned, as do those after it. `adjoins[i]`: 1 where handle i is the next pin behind
   * handle i - 1, and only RAM of the guest is between them: an IOMMU may release both as one range.
   */
  release(handles: Int32Array, count: number, adjoins?: Uint8Array): number;

  /**
   * Which of the first `count` addresses of pinned pages have lost their memory since: somebody discarded it, and the
   * pin keeps a page that nobody sees any more (1), or not (0). Memory that has come back there is not noticed. Throws
   * HostError.
   */
  discarded(addresses: Float64Array, count: number, out: Uint8Array): void;

  /** What the kernel says this process has pinned (pages), and where it says so; null without a kernel pin. */
  kernelPinnedPages(): number | null;
  readonly kernelSource: "VmPin" | "VmLck" | "none";

  /** Release everything. Idempotent. */
  close(): void;
}
