import type { Bdf } from "../base/units.ts";
import { PinRange, ReqPin, VIRTIO_IOMMU_S_OK, VIRTIO_IOMMU_T_PIN } from "../wire/virtio-iommu.ts";
import type { PinRequester } from "./dma.ts";
import { DmaMapFailed } from "./dma-api.ts";
import { REQUEST_MAX, RequestChannel, type RequestChannelOptions } from "./request-channel.ts";
import type { TrackingUnits } from "./units.ts";

/** Ranges that fit into a request: as many as in the page of guest/linux/pin.c. */
const BUFFER_RANGES = Math.floor((REQUEST_MAX - ReqPin.size) / PinRange.size);

export interface PinRequestsOptions extends RequestChannelOptions {
  readonly units: TrackingUnits;
  /** What the device accepts: pin_batch_max. */
  readonly rangesMax: number;
}

/** A frame range: [first GFN, number of frames]. */
export type FrameRange = readonly [gfn: number, nr: number];

/** PIN requests: docs/abi.md section 3. */
export class PinRequests extends RequestChannel implements PinRequester {
  readonly #o: PinRequestsOptions;
  readonly #rangesMax: number;

  constructor(options: PinRequestsOptions) {
    super(options);
    this.#o = options;
    this.#rangesMax = Math.min(options.rangesMax, BUFFER_RANGES);
  }

  /**
   * Ask for those frames of `ranges` that are not pinned; the caller has counted them up. Neighbours are merged, and
   * all go into one request if they fit. Throws DmaMapFailed unless every frame is seen pinned.
   */
  pin(endpoint: Bdf, ranges: Iterable<FrameRange>): void {
    this.locked(() => {
      this.recover();
      const batch = new Batch();
      for (const [first, nr] of ranges) {
        this.checkOn();
        for (let gfn = first; gfn < first + nr; gfn++) {
          if (this.#o.units.pinned(gfn) || batch.extend(gfn)) continue;
          if (batch.ranges.length === this.#rangesMax) this.#flush(endpoint, batch);
          batch.begin(gfn);
        }
      }
      this.#flush(endpoint, batch);
    });
  }

  #flush(endpoint: Bdf, batch: Batch): void {
    const { units } = this.#o;
    const ranges = batch.take();
    if (ranges.length === 0) return;
    const request = ReqPin.encode(
      { type: VIRTIO_IOMMU_T_PIN, endpoint, nrRanges: ranges.length },
      ranges.length * PinRange.size,
    );
    ranges.forEach((range, i) => void PinRange.write(request, range, ReqPin.size + i * PinRange.size));
    this.counters.pinRequests++;
    const status = this.exchange(request);
    if (status !== VIRTIO_IOMMU_S_OK) throw new DmaMapFailed("refused", status);
    // The host says that it has set P in every frame; the mapping must see it before its device has the address.
    for (const { gfn, nrFrames } of ranges)
      for (let i = 0; i < nrFrames; i++)
        if (!units.pinned(gfn + i)) {
          this.counters.pinNotSeen++;
          throw new DmaMapFailed("not-seen");
        }
    this.counters.pinFrames += ranges.reduce((sum, r) => sum + r.nrFrames, 0);
  }
}

/** The ranges of the request that is being built. */
class Batch {
  ranges: { gfn: number; nrFrames: number }[] = [];

  /** Whether `gfn` is in, or behind, the last range, and so needs no range of its own. */
  extend(gfn: number): boolean {
    const last = this.ranges.at(-1);
    if (!last || gfn < last.gfn || gfn > last.gfn + last.nrFrames) return false;
    if (gfn === last.gfn + last.nrFrames) last.nrFrames++; // else neighbours in a list share the frame
    return true;
  }

  begin(gfn: number): void {
    this.ranges.push({ gfn, nrFrames: 1 });
  }

  take(): { gfn: number; nrFrames: number }[] {
    const { ranges } = this;
    this.ranges = [];
    return ranges;
  }
}
