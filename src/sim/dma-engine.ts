import { DmaFault } from "../base/errors.ts";
import { FRAME_SIZE, framesIn } from "../base/units.ts";
import type { DmaSegment } from "../driver/dma-api.ts";
import { GatedMemory } from "../memory/gated-memory.ts";
import type { GuestRegion } from "../memory/guest-memory.ts";
import { DeviceGate } from "../tracking/software-iommu.ts";
import type { Checks } from "./checks.ts";
import { type Operation, Process } from "./process.ts";
import { SteppedMemory, SteppedWords } from "./stepped-memory.ts";
import { step, Violation } from "./turn.ts";
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
  /** It leads nowhere, and is to fault. */
  readonly stray?: boolean;
  done(): void;
}

export type MakeGate = (...args: ConstructorParameters<typeof DeviceGate>) => DeviceGate;

/** An assigned device: moves data in the buffers it was told, behind the production gate. */
export class DmaEngine {
  readonly process: Process;
  readonly #id: number;
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
    /** The device asks the host for a frame, or has met a fault. */
    readonly ring: () => void;
    /** It is about to tell of a fault at an address in its job. */
    readonly faults: (engine: DmaEngine, address: number, job: Job) => void;
    readonly makeGate?: MakeGate;
  }) {
    this.#id = o.id;
    this.#checks = o.checks;
    this.process = new Process(`device${o.id}`, o.turns, () => this.#next());
    const memory = new SteppedMemory(o.regions, this.process, {
      touched: (gpa, length) => {
        const { writes, frames } = this.#jobs[0]!;
        o.checks.transferred(gpa, length, writes, frames);
        for (const gfn of framesIn(gpa, length)) o.checks.claims.transferred(o.id, gfn);
      },
    });
    const { makeGate = (...args) => new DeviceGate(...args) } = o;
    const gate = makeGate(new SteppedWords(o.iommu, this.process, o.idleWord), o.id, o.ring);
    const fault = gate.fault.bind(gate);
    // Seen before the host can see it.
    gate.fault = (address, access) => {
      step(this.process, "fault", () => o.faults(this, this.#checked(address), this.#jobs[0]!));
      fault(address, access);
    };
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
    this.#checks.claims.begins(this.#id, job.frames ?? framesIn(iova, length));
    const excused = job.mayFault?.() ?? false;
    const faulted = job.unmapped ? this.#checks.faultable() : (gpa: number) => this.#checks.faulted(gpa);
    return {
      run: () => this.#memory.transfer(iova, length, () => {}, job.writes ? "write" : "read"),
      settle: (outcome) => {
        this.#checks.claims.ends(this.#id);
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

  /** An address that a job faults at is its first byte, or that of a page. */
  #checked(address: number): number {
    const { iova, length } = this.#jobs[0]!.segments[this.#segment]!;
    if (address === iova) return address;
    if (address % FRAME_SIZE !== 0 || address < iova || address >= iova + length)
      throw new Violation(
        `a fault at 0x${address.toString(16)} in ${length} bytes at 0x${iova.toString(16)}`,
      );
    return address;
  }

  #failed(error: unknown, faulted: (gpa: number) => void): void {
    if (error instanceof DmaFault) faulted(error.gpa);
    else throw new Violation(`a device failed: ${error}`);
  }
}
