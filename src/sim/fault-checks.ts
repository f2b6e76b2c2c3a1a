import type { FaultReport } from "../driver/fault-events.ts";
import type { TrackingCounters } from "../tracking/tracker.ts";
import { Violation } from "./turn.ts";

/** A fault as its device has met it. */
export interface MetFault {
  readonly device: number;
  readonly address: number;
  /** Undefined while that is not fixed. */
  readonly writes: boolean | undefined;
  /** Reasons that are right: more than one while it cannot be told what the address meant. */
  readonly reasons: readonly number[];
}

/** The event queue of a driver that is active: another generation after each reset. */
export interface LiveEventQueue {
  readonly generation: number;
  readonly buffers: number;
}

/** Faults of one device that the host must be able to keep, abi.md and ADR 4, 38. */
const WAITING_MIN = 16;

/**
 * Each DMA fault is reported once, rightly and in its device's order, or counted as dropped; and it is dropped only when
 * 16 of its device wait, the driver has no buffer left, or no driver is there. Judged by what devices meet and what the
 * guest's driver reads; the host's two counters must agree.
 */
export class FaultChecks {
  readonly #counters: TrackingCounters;
  readonly #endpoint: (device: number) => number;
  readonly #queue: () => LiveEventQueue | undefined;
  /** A guest that writes garbage may read what it likes. */
  readonly #hostile: boolean;
  /** By endpoint, those that the guest has not been told of. */
  readonly #untold = new Map<number, MetFault[]>();
  /** By device, at most so many wait for the host. */
  readonly #waiting = new Map<number, number>();
  /** So many may have found their device's ring full. */
  #overflows = 0;
  #met = 0;
  #told = 0;
  /** Reported to a guest whose memory has gone since. */
  #forgotten = 0;
  #seen: { generation: number | undefined; dropped: number } = { generation: undefined, dropped: 0 };

  constructor(o: {
    counters: TrackingCounters;
    endpoint: (device: number) => number;
    queue: () => LiveEventQueue | undefined;
    hostile: boolean;
  }) {
    this.#counters = o.counters;
    this.#endpoint = o.endpoint;
    this.#queue = o.queue;
    this.#hostile = o.hostile;
  }

  /** Reports that the guest has not read yet. */
  get unread(): number {
    return this.#counters.faultsReported - this.#told - this.#forgotten;
  }

  /** A device is about to tell of a fault. */
  met(fault: MetFault): void {
    this.#met++;
    const waiting = this.#waiting.get(fault.device) ?? 0;
    if (waiting >= WAITING_MIN) this.#overflows++;
    this.#waiting.set(fault.device, waiting + 1);
    const endpoint = this.#endpoint(fault.device);
    const untold = this.#untold.get(endpoint) ?? [];
    untold.push(fault);
    this.#untold.set(endpoint, untold);
  }

  /** The guest's driver has read a report. */
  told(report: FaultReport): void {
    if (this.#hostile) return;
    if (this.unread <= 0) throw new Violation(`a fault is reported twice: ${JSON.stringify(report)}`);
    const untold = this.#untold.get(report.endpoint) ?? [];
    const at = untold.findIndex((met) => isOf(report, met));
    if (at < 0) throw new Violation(`a fault is reported that was not: ${JSON.stringify(report)}`);
    // Those before it were dropped.
    untold.splice(0, at + 1);
    this.#told++;
  }

  /** The guest has looked, and there were reports. */
  read(before: number, told: number): void {
    if (before > 0 && told === 0 && !this.#hostile)
      throw new Violation(`${before} faults are said to be reported, and the guest finds none`);
  }
  get toldSoFar(): number {
    return this.#told;
  }

  /** The guest's memory is lost, or the backend that had the faults. */
  forget(): void {
    this.#forgotten += this.unread;
  }
  backendDied(): void {
    this.#waiting.clear();
  }

  /** The host looks for faults: it takes all that devices have told of before. */
  serving(report: () => void): void {
    const queue = this.#queue();
    const dropped = this.#counters.faultsDropped;
    if (dropped > this.#seen.dropped && queue && queue.generation === this.#seen.generation)
      this.#complain(dropped - this.#seen.dropped);
    const waiting = new Map(this.#waiting);
    const told = this.#told + this.#forgotten;
    report();
    // The last one of each may have been too late.
    for (const [device, n] of waiting)
      this.#waiting.set(device, this.#waiting.get(device)! - Math.max(0, n - 1));
    const now = this.#counters;
    if (now.faultsReported + now.faultsDropped > this.#met)
      throw new Violation(
        `${now.faultsReported} faults are reported, ${now.faultsDropped} dropped: too many`,
      );
    this.#seen = { generation: this.#queue()?.generation, dropped: now.faultsDropped };
    const lost = now.faultsDropped - dropped;
    const live = queue !== undefined && queue.generation === this.#seen.generation;
    if (lost === 0 || !live || now.faultsReported - told >= queue.buffers) return;
    if (lost > this.#overflows) this.#complain(lost);
    this.#overflows -= lost;
  }

  #complain(lost: number): void {
    if (!this.#hostile) throw new Violation(`${lost} faults are dropped, and there was room for them`);
  }

  /** Devices have met no fault for long. */
  atRest(): void {
    const { faultsReported, faultsDropped } = this.#counters;
    if (faultsReported + faultsDropped !== this.#met)
      throw new Violation(
        `of ${this.#met} faults ${faultsReported} were reported and ${faultsDropped} dropped`,
      );
  }
}

const isOf = (report: FaultReport, met: MetFault): boolean =>
  report.address === met.address &&
  report.writes === (met.writes ?? report.writes) &&
  report.reads === !report.writes &&
  met.reasons.includes(report.reason);
