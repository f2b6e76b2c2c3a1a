import type { DmaDirection, DmaSegment } from "../driver/dma-api.ts";
import type { RemappedDevice } from "./remapped-device.ts";

/** A mapping that a CPU's driver has made. */
export interface Mapping {
  readonly segments: readonly DmaSegment[];
  readonly frames: readonly number[];
  readonly direction: DmaDirection;
  /** Whose it is alone; any device's otherwise. */
  readonly device: RemappedDevice | undefined;
  /** DMA under way in it. */
  jobs: number;
  readonly release: () => void;
}
