import { FRAME_SIZE, type Gpa, type Iova } from "../base/units.ts";
import type { DmaApi } from "./dma-api.ts";
import type { FrameCache } from "./frames.ts";

/** How a network driver takes its receive buffers. */
export type ReceiveMode = keyof typeof MODES;

/** A buffer that the device may write. */
export interface ReceiveBuffer {
  readonly gpa: Gpa;
  readonly iova: Iova;
}

export interface ReceiveBuffers {
  /** Bytes of each. */
  readonly size: number;
  /** A buffer for the device, or undefined without memory. Throws DmaMapFailed, and has then kept nothing. */
  take(): ReceiveBuffer | undefined;
  /** The device is done with the buffer: from now on the CPU may read it. */
  received(buffer: ReceiveBuffer): void;
  /** The CPU is done with it. */
  release(buffer: ReceiveBuffer): void;
  /** Every buffer was released. */
  close(): void;
}

/** A page pool, as most drivers have today: mapped once, synchronised per packet. */
class Recycled implements ReceiveBuffers {
  readonly size = FRAME_SIZE;
  readonly #dma: DmaApi;
  readonly #frames: FrameCache;
  readonly #free: ReceiveBuffer[] = [];

  constructor(dma: DmaApi, frames: FrameCache) {
    this.#dma = dma;
    this.#frames = frames;
  }

  take(): ReceiveBuffer | undefined {
    return this.#free.shift() ?? mapped(this.#dma, this.#frames);
  }

  received({ iova }: ReceiveBuffer): void {
    this.#dma.syncForCpu(iova, this.size, "from-device");
  }

  release(buffer: ReceiveBuffer): void {
    this.#dma.syncForDevice(buffer.iova, this.size, "from-device");
    this.#free.push(buffer);
  }

  close(): void {
    for (const { gpa, iova } of this.#free) {
      this.#dma.unmapSingle(iova, this.size, "from-device");
      this.#frames.give([gpa]);
    }
    this.#free.length = 0;
  }
}

/** A frame of its own for each packet, mapped before and unmapped behind it. */
class Fresh implements ReceiveBuffers {
  readonly size = FRAME_SIZE;
  readonly #dma: DmaApi;
  readonly #frames: FrameCache;

  constructor(dma: DmaApi, frames: FrameCache) {
    this.#dma = dma;
    this.#frames = frames;
  }

  take(): ReceiveBuffer | undefined {
    return mapped(this.#dma, this.#frames);
  }

  received({ iova }: ReceiveBuffer): void {
    this.#dma.unmapSingle(iova, this.size, "from-device");
  }

  release({ gpa }: ReceiveBuffer): void {
    this.#frames.give([gpa]);
  }

  close(): void {}
}

/** Two buffers in a frame, each mapped for its packet: a frame has up to two mappings at once. */
class Halves implements ReceiveBuffers {
  readonly size = FRAME_SIZE / 2;
  readonly #dma: DmaApi;
  readonly #frames: FrameCache;
  /** Halves that are not in use, of frames whose other half is. */
  readonly #free = new Set<number>();

  constructor(dma: DmaApi, frames: FrameCache) {
    this.#dma = dma;
    this.#frames = frames;
  }

  take(): ReceiveBuffer | undefined {
    const [half] = this.#free;
    const gpa = (half ?? this.#frames.take(1)?.[0]) as Gpa | undefined;
    if (gpa === undefined) return undefined;
    try {
      const iova = this.#dma.mapSingle(gpa, this.size, "from-device");
      if (half === undefined) this.#free.add(gpa + this.size);
      else this.#free.delete(half);
      return { gpa, iova };
    } catch (error) {
      if (half === undefined) this.#frames.give([gpa]);
      throw error;
    }
  }

  received({ iova }: ReceiveBuffer): void {
    this.#dma.unmapSingle(iova, this.size, "from-device");
  }

  release({ gpa }: ReceiveBuffer): void {
    const frame = (gpa - (gpa % FRAME_SIZE)) as Gpa;
    const other = gpa === frame ? gpa + this.size : frame;
    if (this.#free.delete(other)) this.#frames.give([frame]);
    else this.#free.add(gpa);
  }

  close(): void {}
}

const MODES = { recycled: Recycled, fresh: Fresh, half: Halves };
export const RECEIVE_MODES = Object.keys(MODES) as readonly ReceiveMode[];

export const receiveBuffers = (mode: ReceiveMode, dma: DmaApi, frames: FrameCache): ReceiveBuffers =>
  new MODES[mode](dma, frames);

function mapped(dma: DmaApi, frames: FrameCache): ReceiveBuffer | undefined {
  const taken = frames.take(1);
  if (!taken) return undefined;
  const gpa = taken[0]!;
  try {
    return { gpa, iova: dma.mapSingle(gpa, FRAME_SIZE, "from-device") };
  } catch (error) {
    frames.give(taken);
    throw error;
  }
}
