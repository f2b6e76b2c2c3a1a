import type { Clock } from "../base/clock.ts";
import type { Bdf, Gpa, Iova } from "../base/units.ts";
import type { EventLogWriter, LoggedEvent, LoggedRange } from "../wire/event-log.ts";
import { rangeOf } from "./dma.ts";
import type { DmaApi, DmaBuffer, DmaDirection, DmaSegment } from "./dma-api.ts";

/** Writes down what a driver maps in the end, and unmaps. For functions in bypass, whose DMA addresses are the guest's. */
export class RecordingDma implements DmaApi {
  readonly #dma: DmaApi;
  readonly #log: EventLogWriter;
  readonly #clock: Clock;
  readonly #source: { readonly cpu: number; readonly endpoint: Bdf };

  constructor(
    dma: DmaApi,
    log: EventLogWriter,
    clock: Clock,
    source: { readonly cpu: number; readonly endpoint: Bdf },
  ) {
    this.#dma = dma;
    this.#log = log;
    this.#clock = clock;
    this.#source = source;
  }

  mapSingle(gpa: Gpa, length: number, direction: DmaDirection): Iova {
    const iova = this.#dma.mapSingle(gpa, length, direction);
    this.#add("map", [rangeOf({ iova, length })]);
    return iova;
  }
  unmapSingle(iova: Iova, length: number, direction: DmaDirection): void {
    this.#add("unmap", [rangeOf({ iova, length })]);
    this.#dma.unmapSingle(iova, length, direction);
  }

  mapSg(list: readonly DmaBuffer[], direction: DmaDirection): DmaSegment[] {
    const segments = this.#dma.mapSg(list, direction);
    this.#add("map", segments.map(rangeOf));
    return segments;
  }
  unmapSg(list: readonly DmaSegment[], direction: DmaDirection): void {
    this.#add("unmap", list.map(rangeOf));
    this.#dma.unmapSg(list, direction);
  }

  allocCoherent(length: number): { gpa: Gpa; iova: Iova } {
    const memory = this.#dma.allocCoherent(length);
    this.#add("map", [rangeOf({ iova: memory.iova, length })]);
    return memory;
  }
  freeCoherent(gpa: Gpa, iova: Iova, length: number): void {
    this.#add("unmap", [rangeOf({ iova, length })]);
    this.#dma.freeCoherent(gpa, iova, length);
  }

  syncForCpu(iova: Iova, length: number, direction: DmaDirection): void {
    this.#dma.syncForCpu(iova, length, direction);
  }
  syncForDevice(iova: Iova, length: number, direction: DmaDirection): void {
    this.#dma.syncForDevice(iova, length, direction);
  }

  #add(kind: LoggedEvent["kind"], ranges: readonly LoggedRange[]): void {
    this.#log.add({ time: this.#clock.now(), kind, source: this.#source, ranges });
  }
}
