import type { Gfn } from "../base/units.ts";
import type { GfnBuffer } from "../policy/policy.ts";

/** Frames [first, end). */
export interface OrphanRange {
  readonly first: number;
  readonly end: number;
  /** Only those that have lost their memory since they were pinned. */
  readonly discarded?: boolean | undefined;
}

/**
 * The host's pins of the ledger's frames; frames that follow each other may share one. Extents where the host can pin a
 * page twice, Blocks where it cannot.
 */
export interface FramePins {
  /** Pages that are pinned for no frame of the ledger. */
  readonly orphans: number;
  /** Of them, those that are to go as soon as the host lets them. */
  readonly abandoned: number;

  /** Whether a frame that is not in the ledger has a pin all the same, which pin() would give it. */
  covers(gfn: Gfn): boolean;

  /**
   * Pin frames of RAM that are not in the ledger, and tell the handle of each; `present`: where the kernel can tell, only
   * if all have memory. Throws HostError; then none of them is.
   */
  pin(gfns: readonly Gfn[], pinned: (gfn: Gfn, handle: number) => void, present?: boolean): void;

  /**
   * Take over pins, page by page; those of one handle follow each other. A page whose frame has a pin is of no frame.
   */
  adopt(
    pages: Iterable<readonly [gfn: Gfn, handle: number]>,
    pinned: (gfn: Gfn, handle: number) => void,
  ): void;

  /** The frame has left the ledger, whatever becomes of its page: that goes with releaseOrphans(), as soon as it can. */
  abandon(gfn: Gfn, handle: number): void;

  /** Pages that are pinned for frames of the ledger which nobody uses, because others of their pin are used. */
  readonly waiting: number;

  /**
   * Append to `gfns`, as far as there is room, the frames beside them that are to go with them. True where they have to,
   * accessed lately or not.
   */
  addOthers(gfns: GfnBuffer): boolean;

  /** Drop from `gfns` those whose pin cannot go yet, because others of it do not, and tell each: it waits for them. */
  dropWaiting(gfns: GfnBuffer, waits: (gfn: Gfn) => void): void;

  /** A frame of the ledger is in use: it does not wait. */
  used(gfn: Gfn): void;

  /**
   * `gfns`, frames of the ledger that no device reaches, are to leave it; `handles` are theirs. Returns the handles of
   * those that may not: they stay pinned, because the host has refused.
   */
  release(gfns: GfnBuffer, handles: Int32Array): ReadonlySet<number>;

  releaseOrphans(): void;

  /**
   * One slice of a walk over the pages of a range that are pinned for no frame, and stay so: appended to `out`. `from` is
   * 0, then what was returned; null at the end. Throws HostError.
   */
  collectOrphans(range: OrphanRange, from: number, out: Gfn[]): number | null;
}
