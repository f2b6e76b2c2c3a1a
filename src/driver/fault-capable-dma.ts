import type { Gpa, Iova } from "../base/units.ts";
import type { DmaApi, DmaBuffer, DmaDirection, DmaSegment } from "./dma-api.ts";

/**
 * The DMA API of a fault-capable function: what it cannot fault on, its rings and tables, is tracked; its buffers are
 * not, because the host pins them when the device touches them. The same split as in guest/linux/fault_capable.c.
 */
export class FaultCapableDma implements DmaApi {
  readonly #direct: DmaApi;
  readonly #tracked: DmaApi;

  constructor(direct: DmaApi, tracked: DmaApi) {
    this.#direct = direct;
    this.#tracked = tracked;
  }

  mapSingle(gpa: Gpa, length: number, direction: DmaDirection): Iova {
    return this.#direct.mapSingle(gpa, length, direction);
  }
  unmapSingle(iova: Iova, length: number, direction: DmaDirection): void {
    this.#direct.unmapSingle(iova, length, direction);
  }
  mapSg(list: readonly DmaBuffer[], direction: DmaDirection): DmaSegment[] {
    return this.#direct.mapSg(list, direction);
  }
  unmapSg(list: readonly DmaSegment[], direction: DmaDirection): void {
    this.#direct.unmapSg(list, direction);
  }

  allocCoherent(length: number): { readonly gpa: Gpa; readonly iova: Iova } {
    return this.#tracked.allocCoherent(length);
  }
  freeCoherent(gpa: Gpa, iova: Iova, length: number): void {
    this.#tracked.freeCoherent(gpa, iova, length);
  }

  syncForCpu(iova: Iova, length: number, direction: DmaDirection): void {
    this.#tracked.syncForCpu(iova, length, direction);
  }
  syncForDevice(iova: Iova, length: number, direction: DmaDirection): void {
    this.#tracked.syncForDevice(iova, length, direction);
  }
}
