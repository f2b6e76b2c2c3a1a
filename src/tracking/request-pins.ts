import { HostError } from "../base/errors.ts";
import { FrameIndex, grown } from "../base/frame-index.ts";
import { FRAME_SIZE, GFN_LIMIT, type Gfn, gpaOf } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import type { Asked } from "../policy/speculation/speculation.ts";
import {
  VIRTIO_IOMMU_S_FAULT,
  VIRTIO_IOMMU_S_IOERR,
  VIRTIO_IOMMU_S_NOMEM,
  VIRTIO_IOMMU_S_OK,
  VIRTIO_IOMMU_S_RANGE,
  VIRTIO_IOMMU_S_UNSUPP,
} from "../wire/virtio-iommu.ts";
import type { TrackingCounters } from "./counters.ts";
import type { DirtyTracking } from "./dirty.ts";
import { NO_UNIT, type Unit } from "./dtt.ts";
import { ONLY_DOMAINS } from "./ledger.ts";
import { framesOf, type Mapping } from "./mapping-trees.ts";
import type { Pins } from "./pins.ts";
import type { Speculator } from "./speculator.ts";
import type { TableInUse } from "./table-in-use.ts";

interface RequestPinsOptions {
  readonly memory: GuestMemory;
  readonly pins: Pins;
  readonly table: TableInUse;
  readonly dirty: DirtyTracking;
  readonly counters: TrackingCounters;
  readonly speculator: Speculator;
  /** Frames that the quota has room for. */
  room(): number;
  /** Unpin now all that may be. True if anything was unpinned. */
  unpinAll(): boolean;
  /** Told why the host, and not the guest's request or quota, is to blame for a status. */
  refused(error: HostError): void;
}

/** What the host may have room for again once something is unpinned. */
const SHORTAGES: readonly string[] = ["ENOMEM", "ENOSPC", "EBUSY"];

/**
 * Frames that the guest asks for, all or nothing: a status of docs/abi.md section 3. They are at most those the guest
 * has, which bounds the loops.
 */
export class RequestPins {
  readonly #o: RequestPinsOptions;
  // Scratch, reused: a request's frames and units, and what of them is new.
  #gfns = new Float64Array(256);
  #units = new Float64Array(256);
  readonly #fresh = new FrameIndex();

  constructor(options: RequestPinsOptions) {
    this.#o = options;
  }

  /** A PIN request: all frames pinned and their P set, and maybe others beside them; or nothing newly pinned. */
  serve(asked: Asked): number {
    const { memory, table, dirty, speculator } = this.#o;
    const { ranges } = asked;
    if (!table.active) return VIRTIO_IOMMU_S_UNSUPP;
    const total = ranges.reduce((sum, r) => sum + r.nrFrames, 0);
    if (total > memory.size / FRAME_SIZE) return VIRTIO_IOMMU_S_RANGE;
    if (ranges.some((r) => r.gfn + r.nrFrames > GFN_LIMIT)) return VIRTIO_IOMMU_S_RANGE;
    this.#gfns = grown(this.#gfns, total);
    this.#units = grown(this.#units, total);
    let n = 0;
    for (const { gfn: first, nrFrames } of ranges)
      for (let gfn = first as Gfn; gfn < first + nrFrames; gfn++) {
        if (!memory.find(gpaOf(gfn), FRAME_SIZE)) return VIRTIO_IOMMU_S_RANGE;
        const unit = table.walk(gfn);
        if (unit === NO_UNIT) return VIRTIO_IOMMU_S_FAULT;
        this.#gfns[n] = gfn;
        this.#units[n++] = unit;
      }
    speculator.expect(asked);
    const status = this.#pinFresh(n, table.generation);
    if (status !== VIRTIO_IOMMU_S_OK) return status;
    for (let i = 0; i < n; i++) {
      const gfn = this.#gfns[i]! as Gfn;
      if (table.isForeign(gfn)) dirty.remember(gfn);
      table.own(gfn, this.#units[i]! as Unit);
    }
    speculator.pin();
    return VIRTIO_IOMMU_S_OK;
  }

  /** What a domain maps. `pinned`: all RAM is, as a whole. */
  hold(mapping: Mapping, pinned: boolean): number {
    const { memory, pins } = this.#o;
    const count = mapping.last - mapping.first + 1;
    // A range of RAM repeats no frame.
    if (count > memory.size / FRAME_SIZE || mapping.gfn + count > GFN_LIMIT) return VIRTIO_IOMMU_S_RANGE;
    this.#gfns = grown(this.#gfns, count);
    let n = 0;
    for (const gfn of framesOf(mapping)) {
      if (!memory.find(gpaOf(gfn), FRAME_SIZE)) return VIRTIO_IOMMU_S_RANGE;
      this.#gfns[n++] = gfn;
    }
    if (pinned) return VIRTIO_IOMMU_S_OK;
    const status = this.#pinFresh(n, ONLY_DOMAINS);
    if (status === VIRTIO_IOMMU_S_OK) pins.need(mapping);
    return status;
  }

  /** A frame of RAM that a device touches, under a generation of the ledger. */
  touch(gfn: Gfn, generation: number): number {
    this.#gfns[0] = gfn;
    return this.#pinFresh(1, generation);
  }

  /** Pin those of the first `count` frames of #gfns that are not pinned; with a full unpin first where it is tight. */
  #pinFresh(count: number, generation: number): number {
    const { pins, counters, room, unpinAll } = this.#o;
    for (let attempt = 0; ; attempt++) {
      const pages = this.#collectFresh(count);
      let refusal: HostError | undefined;
      if (pages === 0 || pages <= room())
        try {
          pins.pin([...this.#fresh], generation);
          counters.framesPinned += this.#fresh.size;
          return VIRTIO_IOMMU_S_OK;
        } catch (error) {
          if (!(error instanceof HostError)) throw error;
          refusal = error;
        }
      const hopeless = refusal !== undefined && !SHORTAGES.includes(refusal.errno);
      // What the unpin frees may be among this request's frames, if the guest did not count them: collect again.
      if (!hopeless && attempt === 0 && unpinAll()) continue;
      if (refusal) this.#o.refused(refusal);
      const noRoom = refusal === undefined || refusal.errno === "ENOSPC";
      return noRoom ? VIRTIO_IOMMU_S_NOMEM : VIRTIO_IOMMU_S_IOERR;
    }
  }

  /** Returns how many pages are to be pinned for them. */
  #collectFresh(count: number): number {
    const { pins } = this.#o;
    let pages = 0;
    this.#fresh.clear();
    for (let i = 0; i < count; i++) {
      const gfn = this.#gfns[i]! as Gfn;
      if (pins.ledger.has(gfn) || this.#fresh.find(gfn) >= 0) continue;
      this.#fresh.insert(gfn);
      if (!pins.covers(gfn)) pages++;
    }
    return pages;
  }
}
