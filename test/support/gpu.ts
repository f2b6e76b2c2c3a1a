import { Gpu } from "../../src/device/gpu.ts";
import { GpuDriver } from "../../src/driver/gpu.ts";
import { GatedMemory } from "../../src/memory/gated-memory.ts";
import type { GuestAccess } from "../../src/memory/guest-memory.ts";
import { TestDma, TestPages } from "./dma.ts";
import { ram } from "./guest.ts";
import { zeroCounters } from "./nvme.ts";

export interface GpuRigOptions {
  readonly frames?: number;
  /** Frames that the allocator has: those behind them are the test's. */
  readonly allocatable?: number;
  /** Entries of the device's table. */
  readonly pages?: number;
  readonly size?: number;
  readonly Dma?: typeof TestDma;
  /** The device's memory, given that of the IOMMU. */
  readonly access?: (gated: GuestAccess) => GuestAccess;
}

/** A graphics device behind an IOMMU that maps what the driver mapped, and what a driver needs. */
export function gpuParts({
  frames = 4096,
  allocatable = frames,
  Dma = TestDma,
  access = (gated) => gated,
}: GpuRigOptions = {}) {
  const memory = ram(frames);
  const pages = new TestPages(memory, 16, allocatable - 16);
  const dma = new Dma(pages);
  const counters = zeroCounters();
  const gpu = new Gpu(access(new GatedMemory(memory, dma.gate)), counters);
  return { memory, pages, dma, counters, gpu };
}

/** The same with its driver. */
export function gpuRig(options: GpuRigOptions = {}) {
  const parts = gpuParts({ allocatable: 0x800, ...options });
  const { memory, dma, gpu } = parts;
  const driver = new GpuDriver({
    ...{ memory, dma, port: gpu },
    ...{ size: options.size ?? 8, pages: options.pages ?? 256 },
  });
  gpu.start(driver);
  return { ...parts, driver };
}
