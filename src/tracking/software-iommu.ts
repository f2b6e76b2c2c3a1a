import type { Clock } from "../base/clock.ts";
import { InvariantViolation } from "../base/errors.ts";
import { type Gfn, milliseconds } from "../base/units.ts";
import type { DmaGate } from "../memory/gated-memory.ts";
import { SharedWords } from "../memory/shared-words.ts";

/** Words at the start of the shared table. */
const MODE = 0;
const GRANTING = 1;
/** Per device, from here: window sequence (odd: a DMA window is open), request state, requested GFN low, high. */
const DEVICES = 16;
const PER_DEVICE = 16; // one cache line
const SEQUENCE = 0;
const REQUEST = 1;
const REQUEST_LOW = 2;
const REQUEST_HIGH = 3;

const IDLE = 0;
const ASKED = 1;
const GRANTED = 2;
const REFUSED = 3;

export const DEVICES_MAX = 8;
const BITMAP = DEVICES + DEVICES_MAX * PER_DEVICE;

/** The shared table for GFNs 0 to `frames`. */
export const createIommuBuffer = (frames: number): SharedArrayBuffer =>
  new SharedArrayBuffer(4 * (BITMAP + Math.ceil(frames / 32)));
/** Whether a word stays as it is in a machine that has `devices` devices and whose IOMMU is not opened. */
export const isIdleIommuWord = (index: number, devices: number): boolean =>
  index === MODE || (index >= DEVICES + devices * PER_DEVICE && index < BITMAP);

/** What createIommuBuffer() made, or a view of it: the simulator's shows each access. */
export type IommuTable = SharedArrayBuffer | SharedWords;
const wordsOf = (table: IommuTable): SharedWords =>
  table instanceof SharedWords ? table : new SharedWords(table);
const framesOf = (words: SharedWords): number => (words.length - BITMAP) * 32;

/** A device window that stays open longer than this (a stuck disk) makes the unpin be taken back, not waited for. */
const QUIESCE_LIMIT = milliseconds(2);
/** A device waits this long for the backend's answer; the backend may be inside a slice or a large PIN. */
const REQUEST_TIMEOUT_MS = 5000;

/**
 * The IOMMU of our assigned devices: the table of pinned frames that the backend writes and devices read, exactly
 * as a hardware IOMMU reads its page table. One bit per frame. The memory is only reserved: the kernel commits the
 * pages of it in which a frame was pinned (4 KiB for 128 MiB of guest).
 *
 * This class is the backend's side; DeviceGate is a device's.
 */
export class SoftwareIommu {
  readonly #words: SharedWords;
  readonly #frames: number;
  readonly #clock: Clock;

  constructor(table: IommuTable, clock: Clock) {
    this.#words = wordsOf(table);
    this.#frames = framesOf(this.#words);
    this.#clock = clock;
  }

  /** Open: every DMA is allowed (strategy `none`). */
  setOpen(open: boolean): void {
    this.#words.store(MODE, open ? 1 : 0);
  }

  /** Whether devices may ask for frames that they touch to be pinned: only while the guest is undecided. */
  setGranting(granting: boolean): void {
    this.#words.store(GRANTING, granting ? 1 : 0);
  }

  allow(gfn: Gfn): void {
    if (gfn >= this.#frames) throw new InvariantViolation(`frame ${gfn} is beyond the IOMMU table`);
    this.#words.or(BITMAP + (gfn >>> 5), 1 << (gfn & 31));
  }

  revoke(gfn: Gfn): void {
    this.#words.and(BITMAP + (gfn >>> 5), ~(1 << (gfn & 31)));
  }

  /**
   * Wait until no DMA window is open that was opened before this call: what was revoked before it is then out of
   * use. False when a device did not close its window in time; the caller must take the revocation back.
   *
   * ORDERING: revoke is an RMW before the load of the sequence; a device's enter is an RMW before its load of the
   * bit. All are sequentially consistent, so either the device sees the bit clear, or we see its window.
   */
  quiesce(): boolean {
    let deadline = 0;
    for (let device = 0; device < DEVICES_MAX; device++) {
      const at = DEVICES + device * PER_DEVICE + SEQUENCE;
      const seen = this.#words.load(at);
      if ((seen & 1) === 0) continue;
      deadline ||= this.#clock.now() + QUIESCE_LIMIT;
      while (this.#words.load(at) === seen) if (this.#clock.now() > deadline) return false;
    }
    return true;
  }

  /** Answer the devices' requests for a frame: `pin` returns whether it is pinned now. */
  serveRequests(pin: (gfn: Gfn) => boolean): void {
    for (let device = 0; device < DEVICES_MAX; device++) {
      const base = DEVICES + device * PER_DEVICE;
      if (this.#words.load(base + REQUEST) !== ASKED) continue;
      const gfn =
        (this.#words.load(base + REQUEST_LOW) >>> 0) + this.#words.load(base + REQUEST_HIGH) * 2 ** 32;
      this.#words.store(base + REQUEST, pin(gfn as Gfn) ? GRANTED : REFUSED);
      this.#words.notify(base + REQUEST);
    }
  }
}

/** A device's side of the table, in the device's thread. */
export class DeviceGate implements DmaGate {
  readonly #words: SharedWords;
  readonly #base: number;
  readonly #frames: number;
  readonly #ring: () => void;

  /** `device`: this device's number, below DEVICES_MAX. `ring`: wake the backend for a request. */
  constructor(table: IommuTable, device: number, ring: () => void) {
    if (device >= DEVICES_MAX) throw new InvariantViolation(`device ${device} of ${DEVICES_MAX}`);
    this.#words = wordsOf(table);
    this.#base = DEVICES + device * PER_DEVICE;
    this.#frames = framesOf(this.#words);
    this.#ring = ring;
  }

  enter(): void {
    this.#words.add(this.#base + SEQUENCE, 1);
  }

  leave(): void {
    this.#words.add(this.#base + SEQUENCE, 1);
  }

  allows(gfn: Gfn): boolean {
    if (this.#words.load(MODE) === 1) return true;
    return gfn < this.#frames && (this.#words.load(BITMAP + (gfn >>> 5)) & (1 << (gfn & 31))) !== 0;
  }

  request(gfn: Gfn): boolean {
    if (this.#words.load(GRANTING) === 0 || gfn >= this.#frames) return false;
    const at = this.#base + REQUEST;
    this.#words.store(this.#base + REQUEST_LOW, gfn | 0);
    this.#words.store(this.#base + REQUEST_HIGH, Math.floor(gfn / 2 ** 32));
    this.#words.store(at, ASKED);
    this.#ring();
    this.#words.wait(at, ASKED, REQUEST_TIMEOUT_MS);
    const granted = this.#words.load(at) === GRANTED;
    this.#words.store(at, IDLE);
    return granted;
  }
}
