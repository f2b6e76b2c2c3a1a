import type { Clock } from "../base/clock.ts";
import { InvariantViolation, invariant } from "../base/errors.ts";
import { type Gfn, milliseconds } from "../base/units.ts";
import { type DmaGate, NO_FRAME } from "../memory/gated-memory.ts";
import type { DmaAccess } from "../memory/guest-memory.ts";
import { SharedWords } from "../memory/shared-words.ts";
import {
  VIRTIO_IOMMU_FAULT_R_DOMAIN,
  VIRTIO_IOMMU_FAULT_R_MAPPING,
  VIRTIO_IOMMU_FAULT_R_UNKNOWN,
  VIRTIO_IOMMU_MAP_F_READ,
  VIRTIO_IOMMU_MAP_F_WRITE,
} from "../wire/virtio-iommu.ts";
import type { TrackingCounters } from "./counters.ts";
import { FAULT_WORDS, FaultLog, putFault } from "./faults.ts";
import { ENTRY_FLAGS, ENTRY_FRAMES, IovaTables, walk } from "./iova-tables.ts";

/** The word at the start of the shared table. */
const GRANTING = 0;
/**
 * Per device, from here: window sequence (odd: a DMA window is open), request state, requested GFN, context: what the
 * device's addresses mean, 1 while it may begin to do DMA by itself, whether it is fault-capable, and how many accesses
 * that asked have ended.
 */
const DEVICES = 16;
const PER_DEVICE = 16; // one cache line
const SEQUENCE = 0;
const REQUEST = 1;
const REQUESTED = 2;
const CONTEXT = 3;
const MASTERING = 4;
const FAULT_CAPABLE = 5;
const ACCESS = 6;

const IDLE = 0;
const ASKED = 1;
const GRANTED = 2;
const REFUSED = 3;

export const DEVICES_MAX = 8;
/** Per device, behind those: faults that the guest is to be told of. */
const FAULTS = DEVICES + DEVICES_MAX * PER_DEVICE;
const PINNED = FAULTS + DEVICES_MAX * FAULT_WORDS;
/**
 * From there on two bits per frame, in one word, so that a device looks once: allowed, and 16 bits above it UNUSED, which
 * the backend sets when the guest asks for the frame, and the first device that reaches it clears.
 */
const FRAMES_PER_WORD = 16;
const UNUSED_SHIFT = 16;
const wordOf = (gfn: number): number => PINNED + (gfn >>> 4);
const allowedBit = (gfn: number): number => 1 << (gfn & 15);
const unusedBit = (gfn: number): number => allowedBit(gfn) << UNUSED_SHIFT;

/** Contexts: bit 0, OPEN, lets a device reach frames that are not pinned; the rest is one of these, or a table. */
const OPEN = 1;
const BYPASS = 0;
const BLOCKED = 2;
/** From here on, in steps of 2: the root of the domain's table. */
const TABLES = 4;
export type Context = typeof BYPASS | typeof BLOCKED | { readonly root: number };
/** Addresses are guest physical ones. */
export const IN_BYPASS: Context = BYPASS;
/** No address means anything. */
export const IS_BLOCKED: Context = BLOCKED;

/**
 * The tables of domains, behind those: 32 words for each of them map all frames twice, as for two devices that are given
 * to user space in domains of their own; and a few pages for the upper levels.
 */
const POOL_FIXED = 16 * 1024;
const POOL_PER_WORD = 32;

/** The shared table for GFNs 0 to `frames`. */
export function createIommuBuffer(frames: number): SharedArrayBuffer {
  invariant(frames <= ENTRY_FRAMES, `an IOMMU table of ${frames} frames`);
  const words = Math.ceil(frames / FRAMES_PER_WORD) * (1 + POOL_PER_WORD);
  return new SharedArrayBuffer(4 * (PINNED + POOL_FIXED + words));
}
/** Whether a word stays as it is in a machine with `devices` devices, whose IOMMU is not opened and has no domains. */
export const isIdleIommuWord = (index: number, devices: number): boolean =>
  index < FAULTS
    ? index >= DEVICES + devices * PER_DEVICE ||
      (index >= DEVICES && [CONTEXT, FAULT_CAPABLE].includes((index - DEVICES) % PER_DEVICE))
    : index >= FAULTS + devices * FAULT_WORDS && index < PINNED;

/** What createIommuBuffer() made, or a view of it: the simulator's shows each access. */
export type IommuTable = SharedArrayBuffer | SharedWords;
const wordsOf = (table: IommuTable): SharedWords =>
  table instanceof SharedWords ? table : new SharedWords(table);
const framesOf = (words: SharedWords): number =>
  ((words.length - PINNED - POOL_FIXED) / (1 + POOL_PER_WORD)) * FRAMES_PER_WORD;
const poolOf = (words: SharedWords): number => PINNED + framesOf(words) / FRAMES_PER_WORD;

/**
 * How many frames devices may reach because the guest has asked for them, and that none has reached since. For anybody who
 * has the table, at any time: nobody waits for it, and it waits for nobody.
 */
export function countUnused(table: IommuTable): number {
  const words = wordsOf(table);
  let unused = 0;
  for (let at = PINNED, end = poolOf(words); at < end; at++) {
    const word = words.load(at);
    for (let bits = word & (word >>> UNUSED_SHIFT); bits !== 0; bits &= bits - 1) unused++;
  }
  return unused;
}

/** A device window that stays open longer than this (a stuck disk) makes the unpin be taken back, not waited for. */
const QUIESCE_LIMIT = milliseconds(2);
/** A device waits this long for the backend's answer; the backend may be inside a slice or a large PIN. */
const REQUEST_TIMEOUT_MS = 5000;

/**
 * The IOMMU of our assigned devices: the table of pinned frames and the tables of domains, that the backend writes and
 * devices read, exactly as a hardware IOMMU reads its page table; and as that sets an accessed flag, devices clear UNUSED
 * when they translate. The memory is only reserved: the kernel commits the pages of it in which a frame was pinned (4 KiB
 * for 64 MiB of guest), and tables that are used.
 *
 * This class is the backend's side; DeviceGate is a device's.
 */
export class SoftwareIommu {
  /** Address spaces of domains, for contexts. */
  readonly tables: IovaTables;
  readonly #words: SharedWords;
  readonly #frames: number;
  readonly #clock: Clock;
  #writesUntold = false;

  constructor(table: IommuTable, clock: Clock) {
    this.#words = wordsOf(table);
    this.#frames = framesOf(this.#words);
    this.#clock = clock;
    const pool = poolOf(this.#words);
    const pages = Math.floor((this.#words.length - pool) / 1024);
    this.tables = new IovaTables(this.#words, pool, pages, () => this.quiesce());
  }

  /** GFNs from this on are not in the table. */
  get frames(): number {
    return this.#frames;
  }

  /** Open: DMA also reaches frames that are not pinned (strategy `none`). */
  setOpen(open: boolean): void {
    for (let device = 0; device < DEVICES_MAX; device++) {
      const at = contextAt(device);
      if (open) this.#words.or(at, OPEN);
      else this.#words.and(at, ~OPEN);
    }
  }

  /** Give a device's addresses another meaning; quiesce() waits until the old one is out of use. */
  setContext(device: number, context: Context): void {
    const at = contextAt(device);
    const meaning = typeof context === "object" ? TABLES + 2 * context.root : context;
    this.#words.store(at, meaning | (this.#words.load(at) & OPEN));
  }

  /** Whether a device may ask at any time for frames that it touches to be pinned. */
  setFaultCapable(device: number, capable: boolean): void {
    this.#words.store(deviceAt(device) + FAULT_CAPABLE, Number(capable));
    this.#writesUntold ||= capable;
  }
  isFaultCapable(device: number): boolean {
    return this.#words.load(deviceAt(device) + FAULT_CAPABLE) !== 0;
  }

  /** Another number when the access has ended in which the device last asked. */
  access(device: number): number {
    return this.#words.load(deviceAt(device) + ACCESS);
  }

  /** There has been a fault-capable device: it may write every pinned frame, and no driver says when. */
  get writesUntold(): boolean {
    return this.#writesUntold;
  }

  /** Whether all devices may ask so: only while the guest is undecided. */
  setGranting(granting: boolean): void {
    this.#words.store(GRANTING, granting ? 1 : 0);
  }

  /** Whether a device may begin to do DMA: its driver has started it, and has not reset it since. */
  isMastering(device: number): boolean {
    return this.#words.load(deviceAt(device) + MASTERING) !== 0;
  }

  /**
   * A device's thread has ended, wherever it was: it does no DMA any more. Without this, a window that it had open would
   * have every unpin taken back from then on.
   */
  deviceEnded(device: number): void {
    const base = deviceAt(device);
    this.#words.store(base + MASTERING, 0);
    this.#words.store(base + REQUEST, IDLE);
    this.#words.add(base + ACCESS, 1);
    if (this.#words.load(base + SEQUENCE) & 1) this.#words.add(base + SEQUENCE, 1);
  }

  /** Devices may reach a frame. `unused`: the guest has asked for it, and none has; left out, that is as it was. */
  allow(gfn: Gfn, unused?: boolean): void {
    if (gfn >= this.#frames) throw new InvariantViolation(`frame ${gfn} is beyond the IOMMU table`);
    if (unused === false) this.setUnused(gfn, false);
    this.#words.or(wordOf(gfn), unused ? allowedBit(gfn) | unusedBit(gfn) : allowedBit(gfn));
  }

  revoke(gfn: Gfn): void {
    this.#words.and(wordOf(gfn), ~allowedBit(gfn));
  }

  setUnused(gfn: Gfn, unused: boolean): void {
    if (unused) this.#words.or(wordOf(gfn), unusedBit(gfn));
    else this.#words.and(wordOf(gfn), ~unusedBit(gfn));
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

  /** The faults of all devices. */
  faultLog(counters: TrackingCounters): FaultLog {
    return new FaultLog(
      this.#words,
      Array.from({ length: DEVICES_MAX }, (_, d) => faultsAt(d)),
      counters,
    );
  }

  /** Answer the devices' requests for a frame: `pin` returns whether it is pinned now. */
  serveRequests(pin: (gfn: Gfn, device: number) => boolean): void {
    for (let device = 0; device < DEVICES_MAX; device++) {
      const base = DEVICES + device * PER_DEVICE;
      if (this.#words.load(base + REQUEST) !== ASKED) continue;
      const gfn = this.#words.load(base + REQUESTED) as Gfn;
      this.#words.store(base + REQUEST, pin(gfn, device) ? GRANTED : REFUSED);
      this.#words.notify(base + REQUEST);
    }
  }
}

function deviceAt(device: number): number {
  invariant(device < DEVICES_MAX, `device ${device} of ${DEVICES_MAX}`);
  return DEVICES + device * PER_DEVICE;
}
const faultsAt = (device: number): number => FAULTS + device * FAULT_WORDS;

/** VIRTIO 1.2 section 5.13.6.9 has no reason for an endpoint in bypass: what it did not reach is not pinned. */
function faultReason(context: number): number {
  if (context <= (BYPASS | OPEN)) return VIRTIO_IOMMU_FAULT_R_UNKNOWN;
  return context < TABLES ? VIRTIO_IOMMU_FAULT_R_DOMAIN : VIRTIO_IOMMU_FAULT_R_MAPPING;
}

const contextAt = (device: number): number => deviceAt(device) + CONTEXT;

/** A device's side of the table, in the device's thread. */
export class DeviceGate implements DmaGate {
  readonly #words: SharedWords;
  readonly #base: number;
  readonly #faults: number;
  readonly #frames: number;
  readonly #pool: number;
  readonly #ring: () => void;
  /** The context in which a page led nowhere last. */
  #refusedIn: number = BYPASS;

  /** `device`: this device's number, below DEVICES_MAX. `ring`: wake the backend for a request or a fault. */
  constructor(table: IommuTable, device: number, ring: () => void) {
    if (device >= DEVICES_MAX) throw new InvariantViolation(`device ${device} of ${DEVICES_MAX}`);
    this.#words = wordsOf(table);
    this.#base = DEVICES + device * PER_DEVICE;
    this.#faults = faultsAt(device);
    this.#frames = framesOf(this.#words);
    this.#pool = poolOf(this.#words);
    this.#ring = ring;
  }

  /** To be called before the first window that the device opens by itself, and when it will open no more. */
  setMastering(on: boolean): void {
    this.#words.store(this.#base + MASTERING, on ? 1 : 0);
  }

  enter(): void {
    this.#words.add(this.#base + SEQUENCE, 1);
  }

  leave(): void {
    this.#words.add(this.#base + SEQUENCE, 1);
  }

  translate(page: number, access: DmaAccess): Gfn | typeof NO_FRAME {
    const context = this.#words.load(this.#base + CONTEXT);
    if (context === BYPASS) return this.#reaches(page) ? (page as Gfn) : this.#refuse(context);
    const gfn = this.#find(context, page, access);
    if (gfn >= 0 && ((context & OPEN) !== 0 || this.#reaches(gfn))) return gfn as Gfn;
    return this.#refuse(context);
  }

  #refuse(context: number): typeof NO_FRAME {
    this.#refusedIn = context;
    return NO_FRAME;
  }

  fault(address: number, access: DmaAccess): void {
    putFault(this.#words, this.#faults, { address, access, reason: faultReason(this.#refusedIn) });
    this.#ring();
  }

  /** Whether the device may access an address, without doing so. */
  allows(page: number, access: DmaAccess = "write"): boolean {
    const context = this.#words.load(this.#base + CONTEXT);
    const gfn = this.#find(context, page, access);
    return gfn >= 0 && ((context & OPEN) !== 0 || this.#isAllowed(gfn));
  }

  #find(context: number, page: number, access: DmaAccess): number {
    if (context <= (BYPASS | OPEN)) return page;
    if (context < TABLES) return NO_FRAME;
    const entry = walk(this.#words, this.#pool, (context - TABLES) >> 1, page);
    const flag = access === "write" ? VIRTIO_IOMMU_MAP_F_WRITE : VIRTIO_IOMMU_MAP_F_READ;
    return (entry & ENTRY_FLAGS & flag) === 0 ? NO_FRAME : entry >>> 2;
  }

  #isAllowed(gfn: number): boolean {
    return gfn < this.#frames && (this.#words.load(wordOf(gfn)) & allowedBit(gfn)) !== 0;
  }

  /**
   * The same, and the frame is not UNUSED any more.
   *
   * ORDERING: none needed for UNUSED beyond that the RMW loses no bit of the backend's. Inside a DMA window: so the frame
   * is not released, and pinned anew, between the two.
   */
  #reaches(gfn: number): boolean {
    if (gfn >= this.#frames) return false;
    const word = this.#words.load(wordOf(gfn));
    if ((word & allowedBit(gfn)) === 0) return false;
    if ((word & unusedBit(gfn)) !== 0) this.#words.and(wordOf(gfn), ~unusedBit(gfn));
    return true;
  }

  request(gfn: Gfn): boolean {
    const mayAsk = this.#words.load(GRANTING) !== 0 || this.#words.load(this.#base + FAULT_CAPABLE) !== 0;
    if (!mayAsk || gfn >= this.#frames) return false;
    // What a domain maps is pinned: there is nothing to ask for.
    if (this.#words.load(this.#base + CONTEXT) > (BYPASS | OPEN)) return false;
    const at = this.#base + REQUEST;
    this.#words.store(this.#base + REQUESTED, gfn);
    this.#words.store(at, ASKED);
    this.#ring();
    this.#words.wait(at, ASKED, REQUEST_TIMEOUT_MS);
    const granted = this.#words.load(at) === GRANTED;
    this.#words.store(at, IDLE);
    return granted;
  }

  accessEnded(): void {
    this.#words.add(this.#base + ACCESS, 1);
  }
}
