import { Gpu } from "../../src/device/gpu.ts";
import { GpuDriver } from "../../src/driver/gpu.ts";
import { GatedMemory } from "../../src/memory/gated-memory.ts";
import type { GuestAccess } from "../../src/memory/guest-memory.ts";
import { TestDma, TestPages } from "./dma.ts";
import { ram } from "./guest.ts";
import { zeroCounters } from "./nvme.ts";

export interface GpuRigOptions {
  readonly frames?: number;
  readonly pages?: number;
  readonly size?: number;
  readonly Dma?: typeof TestDma;
  /** The device's memory, given that of the IOMMU. */
  readonly access?: (gated: GuestAccess) => GuestAccess;
}

/** A graphics driver against its device, in one thread, behind an IOMMU that maps what the driver mapped. */
export function gpuRig({
  frames = 4096,
  pages = 256,
  size = 8,
  Dma = TestDma,
  access = (gated) => gated,
}: GpuRigOptions = {}) {
  const memory = ram(frames);
  const allocator = new TestPages(memory, 16, frames - 16);
  const dma = new Dma(allocator);
  const counters = zeroCounters();
  const gpu = new Gpu(access(new GatedMemory(memory, dma.gate)), counters);
  const driver = new GpuDriver({ memory, dma, port: gpu, size, pages });
  gpu.start(driver);
  return { memory, pages: allocator, dma, counters, gpu, driver };
}
