import { DmaFault } from "../base/errors.ts";
import type { DmaSegment } from "../driver/dma-api.ts";
import { GatedMemory } from "../memory/gated-memory.ts";
import type { GuestRegion } from "../memory/guest-memory.ts";
import { DeviceGate } from "../tracking/software-iommu.ts";
import type { Checks } from "./checks.ts";
import { type Operation, Process } from "./process.ts";
import { SteppedMemory, SteppedWords } from "./stepped-memory.ts";
import { Violation } from "./turn.ts";
import type { Turns } from "./turns.ts";

/** DMA that a driver has told its device to do. */
export interface Job {
  readonly segments: readonly DmaSegment[];
  /** What they lead to, if that is known. */
  readonly frames?: readonly number[];
  /** The device writes the buffer, or reads it. */
  readonly writes: boolean;
  /** Not of a driver that tells what its device uses: whether nobody promises now that it goes through. */
  readonly mayFault?: () => boolean;
  /** No driver has mapped the buffer: the device is fault-capable. */
  readonly unmapped?: boolean;
  done(): void;
}

/** An assigned device: moves data in the buffers it was told, behind the production gate. */
export class DmaEngine {
  readonly process: Process;
  readonly #checks: Checks;
  readonly #memory: GatedMemory;
  /** Buffers moved. */
  transfers = 0;
  #jobs: Job[] = [];
  #segment = 0;

  constructor(o: {
    readonly id: number;
    readonly turns: Turns;
    readonly checks: Checks;
    readonly regions: readonly GuestRegion[];
    readonly iommu: SharedArrayBuffer;
    readonly idleWord: (index: number) => boolean;
    /** The device asks the host for a frame. */
    readonly ring: () => void;
  }) {
    this.#checks = o.checks;
    this.process = new Process(`device${o.id}`, o.turns, () => this.#next());
    const memory = new SteppedMemory(o.regions, this.process, {
      touched: (gpa, length) => {
        const { writes, frames } = this.#jobs[0]!;
        o.checks.transferred(gpa, length, writes, frames);
      },
    });
    const gate = new DeviceGate(new SteppedWords(o.iommu, this.process, o.idleWord), o.id, o.ring);
    this.#memory = new GatedMemory(memory, gate);
  }

  queue(job: Job): void {
    this.#jobs.push(job);
  }

  get atRest(): boolean {
    return this.#jobs.length === 0;
  }

  /** A reset of the function: what it was told is forgotten. The caller has let its DMA window close. */
  reset(): void {
    this.#jobs = [];
    this.#segment = 0;
  }

  #next(): Operation | undefined {
    const job = this.#jobs[0];
    if (!job) return undefined;
    const { iova, length } = job.segments[this.#segment]!;
    const excused = job.mayFault?.() ?? false;
    const faulted = job.unmapped ? this.#checks.faultable() : (gpa: number) => this.#checks.faulted(gpa);
    return {
      run: () => this.#memory.transfer(iova, length, () => {}, job.writes ? "write" : "read"),
      settle: (outcome) => {
        if ("error" in outcome)
          this.#failed(outcome.error, excused || (job.mayFault?.() ?? false) ? () => {} : faulted);
        else this.transfers++;
        if (++this.#segment < job.segments.length) return;
        this.#segment = 0;
        this.#jobs.shift();
        job.done();
      },
    };
  }

  #failed(error: unknown, faulted: (gpa: number) => void): void {
    if (error instanceof DmaFault) faulted(error.gpa);
    else throw new Violation(`a device failed: ${error}`);
  }
}
