import type { Bdf } from "../base/units.ts";
import { RunPool } from "../driver/pages.ts";
import type { IovaAllocator } from "../driver/remapped-dma.ts";
import type { DmaEngine } from "./dma-engine.ts";
import type { Process } from "./process.ts";
import { step, Violation } from "./turn.ts";

/** Of each CPU, in the domain that the device may be attached to. */
const IOVA_PAGES = 16;
const IOVA_FIRST = 2 ** 20;

/** A function that can be attached to a domain, and what the CPUs of a guest know of it together. */
export class RemappedDevice {
  readonly endpoint: Bdf;
  readonly engine: DmaEngine;
  /** Unmapped addresses are taken back in batches. */
  readonly lazy: boolean;
  readonly hostile: boolean;
  /** Whether it can access a page of its address space now. */
  readonly reaches: (page: number) => boolean;
  attached = false;
  /** Being attached or detached: nobody maps. */
  moving = false;
  /** Mappings of all CPUs, those that are being made or taken back included. */
  mappings = 0;
  moves = 0;

  constructor(o: Pick<RemappedDevice, "endpoint" | "engine" | "lazy" | "hostile" | "reaches">) {
    this.endpoint = o.endpoint;
    this.engine = o.engine;
    this.lazy = o.lazy;
    this.hostile = o.hostile;
    this.reaches = o.reaches;
  }

  /** The addresses of a CPU. Allocation is no step, but must not be done again when the operation is run again. */
  iovas(process: Process, cpu: number): IovaAllocator {
    const runs = new RunPool(IOVA_FIRST + cpu * IOVA_PAGES, IOVA_PAGES);
    return {
      take: (pages) => step(process, "take", () => runs.take(pages)),
      give: (page, pages) =>
        step(process, "give", () => {
          // Another mapping may have these addresses from now on.
          for (let i = page; i < page + pages && !this.hostile; i++)
            if (this.reaches(i))
              throw new Violation(`page ${i} of a domain is free, and a device reaches it`);
          runs.give(page, pages);
        }),
    };
  }

  reset(): void {
    this.attached = this.moving = false;
    this.mappings = 0;
  }
}
