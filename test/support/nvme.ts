import { MemoryStore } from "../../src/device/block-store.ts";
import { NvmeController } from "../../src/device/nvme.ts";
import { NvmeQueue } from "../../src/driver/nvme.ts";
import { GatedMemory } from "../../src/memory/gated-memory.ts";
import { TestDma, TestPages } from "./dma.ts";
import { ram } from "./guest.ts";

export const zeroCounters = () => ({ transfers: 0, bytes: 0, requests: 0, faults: 0, errors: 0 });

export interface NvmeRigOptions {
  readonly frames?: number;
  /** Frames that the allocator has: those behind them are the test's. */
  readonly allocatable?: number;
  readonly size?: number;
  readonly store?: MemoryStore;
  /** The driver's DMA API. */
  readonly Dma?: typeof TestDma;
}

/** A controller behind an IOMMU that maps what the driver mapped, and what a driver needs. */
export function nvmeParts({
  frames = 4096,
  allocatable = frames,
  store = new MemoryStore(2 ** 18),
  Dma = TestDma,
}: NvmeRigOptions = {}) {
  const memory = ram(frames);
  const pages = new TestPages(memory, 16, allocatable - 16);
  const dma = new Dma(pages);
  const counters = zeroCounters();
  const controller = new NvmeController(new GatedMemory(memory, dma.gate), store, counters);
  return { memory, pages, dma, counters, controller, store };
}

/** The same with a driver's queue pair. */
export function nvmeRig(options: NvmeRigOptions = {}) {
  const parts = nvmeParts({ allocatable: 0x100, ...options });
  const { memory, dma, controller } = parts;
  const queue = new NvmeQueue({ memory, dma, port: controller, id: 1, size: options.size ?? 8 });
  controller.createQueue(1, queue.rings);
  /** Let both run until nothing is pending. */
  const settle = (turns = 10_000): void => {
    for (let turn = 0; queue.pending > 0; turn++) {
      if (turn === turns) throw new Error(`${queue.pending} requests are pending after ${turns} turns`);
      controller.run(3);
      queue.poll();
    }
  };
  return { ...parts, queue, settle };
}
