import type { DmaAccess } from "../memory/guest-memory.ts";
import type { SharedWords } from "../memory/shared-words.ts";
import type { TrackingCounters } from "./counters.ts";

/** A DMA that the IOMMU has refused. */
export interface Fault {
  /** The device's number in the software IOMMU. */
  readonly device: number;
  /** First byte that was refused. */
  readonly address: number;
  readonly access: DmaAccess;
  /** VIRTIO_IOMMU_FAULT_R_*. */
  readonly reason: number;
}

/** Faults of one device that wait for the backend, which is woken for each; one slice of its work may pass meanwhile. */
const CAPACITY = 16;
/** Words of a ring: head and lost are the device's, on a cache line apart from the backend's tail. */
const HEAD = 0;
const LOST = 1;
const TAIL = 16;
const RECORDS = 32;
/** Words of a record: address in two halves, and what happened. */
const LOW = 0;
const HIGH = 1;
const WHAT = 2;
const PER_RECORD = 4;
const WRITE = 1;
/** Words of one device. */
export const FAULT_WORDS = RECORDS + CAPACITY * PER_RECORD;

const recordAt = (base: number, index: number): number =>
  base + RECORDS + (index & (CAPACITY - 1)) * PER_RECORD;

/**
 * A device's side of its ring: it never waits. What finds the ring full is lost, and counted. All that it knows is in
 * the shared words, so that a thread that takes a device over goes on where the last one ended.
 */
export function putFault(words: SharedWords, base: number, fault: Omit<Fault, "device">): void {
  const head = words.load(base + HEAD);
  if (((head - words.load(base + TAIL)) | 0) >= CAPACITY) {
    words.add(base + LOST, 1);
    return;
  }
  const at = recordAt(base, head);
  words.store(at + LOW, (fault.address % 2 ** 32) | 0);
  // A hostile address was rounded up to 2^64 when it was read.
  words.store(at + HIGH, Math.min(Math.floor(fault.address / 2 ** 32), 0xffff_ffff) | 0);
  words.store(at + WHAT, (fault.reason << 1) | (fault.access === "write" ? WRITE : 0));
  // ORDERING: release; the record is seen before head. PAIRS WITH the load in FaultLog.serve().
  words.store(base + HEAD, (head + 1) | 0);
}

/** The backend's side of all rings. */
export class FaultLog {
  readonly #words: SharedWords;
  readonly #bases: readonly number[];
  readonly #counters: TrackingCounters;

  /** `bases`: where each device's ring begins. */
  constructor(words: SharedWords, bases: readonly number[], counters: TrackingCounters) {
    this.#words = words;
    this.#bases = bases;
    this.#counters = counters;
  }

  /**
   * Take every fault that was there when this call looked, at most CAPACITY of each device. `report` returns whether
   * the guest is told; what it is not told is counted as dropped.
   */
  serve(report: (fault: Fault) => boolean): void {
    this.#bases.forEach((base, device) => {
      const head = this.#words.load(base + HEAD);
      for (let tail = this.#words.load(base + TAIL); tail !== head; ) {
        const fault = this.#read(device, recordAt(base, tail));
        tail = (tail + 1) | 0;
        // ORDERING: release; the record has been read. PAIRS WITH the load in putFault().
        this.#words.store(base + TAIL, tail);
        let told = false;
        try {
          told = report(fault);
        } finally {
          this.#counters[told ? "faultsReported" : "faultsDropped"]++;
        }
      }
      if (this.#words.load(base + LOST) !== 0)
        this.#counters.faultsDropped += this.#words.and(base + LOST, 0) >>> 0;
    });
  }

  #read(device: number, at: number): Fault {
    const what = this.#words.load(at + WHAT);
    return {
      device,
      address: (this.#words.load(at + HIGH) >>> 0) * 2 ** 32 + (this.#words.load(at + LOW) >>> 0),
      access: what & WRITE ? "write" : "read",
      reason: what >>> 1,
    };
  }
}
