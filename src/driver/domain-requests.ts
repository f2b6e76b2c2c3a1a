import { type Bdf, FRAME_SIZE } from "../base/units.ts";
import {
  ReqAttach,
  ReqDetach,
  ReqMap,
  ReqUnmap,
  VIRTIO_IOMMU_S_DEVERR,
  VIRTIO_IOMMU_S_NOENT,
  VIRTIO_IOMMU_S_OK,
  VIRTIO_IOMMU_T_ATTACH,
  VIRTIO_IOMMU_T_DETACH,
  VIRTIO_IOMMU_T_MAP,
  VIRTIO_IOMMU_T_UNMAP,
} from "../wire/virtio-iommu.ts";
import { DmaMapFailed } from "./dma-api.ts";
import { RequestChannel } from "./request-channel.ts";

/** A device that keeps a DMA window open makes the host refuse for 2 ms each time. */
const UNMAP_TRIES = 100;

/** Requests for domains: VIRTIO 1.2 sections 5.13.6.3 to 5.13.6.6. Each throws DmaMapFailed unless it is done. */
export class DomainRequests extends RequestChannel {
  attach(domain: number, endpoint: Bdf): void {
    this.#ask(ReqAttach.encode({ type: VIRTIO_IOMMU_T_ATTACH, domain, endpoint }));
  }

  detach(domain: number, endpoint: Bdf): void {
    this.#ask(ReqDetach.encode({ type: VIRTIO_IOMMU_T_DETACH, domain, endpoint }));
  }

  /** `frames` frames from `gfn` on at `page` and those behind it. */
  map(domain: number, page: number, gfn: number, frames: number, flags: number): void {
    const range = { virtStart: BigInt(page) * 4096n, virtEnd: BigInt(page + frames) * 4096n - 1n };
    const request = { type: VIRTIO_IOMMU_T_MAP, domain, ...range, physStart: gfn * FRAME_SIZE, flags };
    this.counters.mapRequests++;
    this.#ask(ReqMap.encode(request));
  }

  /** All mappings in `pages` pages from `page` on. */
  unmap(domain: number, page: number, pages: number): void {
    const range = { virtStart: BigInt(page) * 4096n, virtEnd: BigInt(page + pages) * 4096n - 1n };
    const request = ReqUnmap.encode({ type: VIRTIO_IOMMU_T_UNMAP, domain, ...range });
    for (let tries = 1; ; tries++)
      try {
        this.counters.unmapRequests++;
        this.#ask(request);
        return;
      } catch (error) {
        const status = error instanceof DmaMapFailed ? error.status : undefined;
        // A domain that is gone maps nothing.
        if (status === VIRTIO_IOMMU_S_NOENT) return;
        if (status !== VIRTIO_IOMMU_S_DEVERR || tries === UNMAP_TRIES) throw error;
      }
  }

  #ask(request: Uint8Array): void {
    this.locked(() => {
      this.recover();
      this.checkOn();
      const status = this.exchange(request);
      if (status !== VIRTIO_IOMMU_S_OK) throw new DmaMapFailed("refused", status);
    });
  }
}
