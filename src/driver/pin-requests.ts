import type { Bdf } from "../base/units.ts";
import { PinRange, ReqPin, VIRTIO_IOMMU_S_OK, VIRTIO_IOMMU_T_PIN } from "../wire/virtio-iommu.ts";
import type { PinRequester } from "./dma.ts";
import { DmaMapFailed } from "./dma-api.ts";
import { type FrameRange, type PinBatchRange, pinInBatches } from "./pin-batches.ts";
import { REQUEST_MAX, RequestChannel, type RequestChannelOptions } from "./request-channel.ts";
import type { TrackingUnits } from "./units.ts";

/** Ranges that fit into a request: as many as in the page of guest/linux/pin.c. */
export const BUFFER_RANGES = Math.floor((REQUEST_MAX - ReqPin.size) / PinRange.size);

export interface PinRequestsOptions extends RequestChannelOptions {
  readonly units: TrackingUnits;
  /** What the device accepts: pin_batch_max. */
  readonly rangesMax: number;
}

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
      this.checkOn();
      const pinned = (gfn: number) => this.#o.units.pinned(gfn);
      pinInBatches(ranges, this.#rangesMax, pinned, (batch) => this.#send(endpoint, batch));
    });
  }

  #send(endpoint: Bdf, ranges: readonly PinBatchRange[]): void {
    this.checkOn();
    const { units } = this.#o;
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
