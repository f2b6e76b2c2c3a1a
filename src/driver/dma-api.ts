import { CoiommuError } from "../base/errors.ts";
import type { Gpa, Iova } from "../base/units.ts";

/** Who writes the buffer, as Linux's enum dma_data_direction. */
export type DmaDirection = "to-device" | "from-device" | "bidirectional";

/** A piece of guest memory; any length, at any offset in its frames. */
export interface DmaBuffer {
  readonly gpa: Gpa;
  readonly length: number;
}

/** The same piece as the device addresses it. */
export interface DmaSegment {
  readonly iova: Iova;
  readonly length: number;
}

/**
 * What a device driver asks for its DMA, as Linux's DMA API (Documentation/core-api/dma-api.rst). A mapping is all or
 * nothing: it throws DmaMapFailed and leaves no trace, or the device may use the address until the unmap.
 */
export interface DmaApi {
  mapSingle(gpa: Gpa, length: number, direction: DmaDirection): Iova;
  unmapSingle(iova: Iova, length: number, direction: DmaDirection): void;
  /** A scatter list, mapped as one: one PIN request for all of it where that is possible. */
  mapSg(list: readonly DmaBuffer[], direction: DmaDirection): DmaSegment[];
  unmapSg(list: readonly DmaSegment[], direction: DmaDirection): void;
  /** Whole frames, zeroed, that CPU and device share for long: rings and tables. */
  allocCoherent(length: number): { readonly gpa: Gpa; readonly iova: Iova };
  freeCoherent(gpa: Gpa, iova: Iova, length: number): void;
  /** Give a buffer that stays mapped back to the CPU, or to the device. Memory is coherent here: it is only counted. */
  syncForCpu(iova: Iova, length: number, direction: DmaDirection): void;
  syncForDevice(iova: Iova, length: number, direction: DmaDirection): void;
}

/** The guest's allocator of frames. */
export interface PageAllocator {
  /** GPA of `frames` contiguous zeroed frames, or undefined. */
  allocate(frames: number): Gpa | undefined;
  free(gpa: Gpa, frames: number): void;
}

export type DmaMapFailure =
  /** The frame is outside the table. */
  | "no-unit"
  /** COUNT would overflow. */
  | "saturated"
  /** The device answered the PIN request with another status than OK. */
  | "refused"
  /** The device answered OK, but P is clear. */
  | "not-seen"
  /** No answer in time. */
  | "lost"
  /** There is no device that answers. */
  | "off"
  /** The guest has no memory left (allocCoherent). */
  | "no-memory";

/** A mapping that cannot be had now; the driver may try again later. */
export class DmaMapFailed extends CoiommuError {
  readonly code = "ERR_COIOMMU_DMA_MAP";
  readonly reason: DmaMapFailure;
  /** Of a refused PIN request: docs/abi.md section 3. */
  readonly status: number | undefined;
  constructor(reason: DmaMapFailure, status?: number) {
    super(
      `the buffer cannot be mapped for DMA: ${reason}${status === undefined ? "" : `, status ${status}`}`,
    );
    this.reason = reason;
    this.status = status;
  }
}
