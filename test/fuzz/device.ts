/**
 * The device under fuzz: VirtioPciFunction -> VirtioIommu -> Tracker over a fake host, served through the pipe
 * transport, and an oracle that looks after every record. It knows what the guest's RAM is from what it did itself.
 */
import { HostError } from "../../src/base/errors.ts";
import { type Bdf, FRAME_SIZE, type Gfn, type Gpa, gpaOf } from "../../src/base/units.ts";
import { counters, countersBuffer } from "../../src/memory/counters.ts";
import { GuestMemory, type GuestRegion } from "../../src/memory/guest-memory.ts";
import { createPolicy } from "../../src/policy/registry.ts";
import { createSpeculation } from "../../src/policy/speculation/registry.ts";
import { DmaTrackingTable, NO_UNIT } from "../../src/tracking/dtt.ts";
import {
  createIommuBuffer,
  DEVICES_MAX,
  DeviceGate,
  SoftwareIommu,
} from "../../src/tracking/software-iommu.ts";
import { TRACKING_COUNTERS, Tracker, type TrackerOptions } from "../../src/tracking/tracker.ts";
import {
  PIPE_DRIVER,
  PIPE_ENDPOINT,
  PIPE_EVENTS,
  PipeServer,
  type Served,
} from "../../src/transport/pipe.ts";
import { EVENT_QUEUE, VirtioIommu } from "../../src/virtio/iommu.ts";
import { VirtioPciFunction } from "../../src/virtio/pci.ts";
import { ENTRY_PRESENT, TU_ACCESSED, TU_COUNT, TU_PINNED } from "../../src/wire/dtt.ts";
import { VIRTIO_STATUS_DRIVER_OK, VirtioPciCommonCfg } from "../../src/wire/pci.ts";
import {
  Fault,
  VIRTIO_IOMMU_FAULT_F_ADDRESS,
  VIRTIO_IOMMU_FAULT_F_READ,
} from "../../src/wire/virtio-iommu.ts";
import { FakeClock } from "../support/clock.ts";
import { HOST_BASE, PRESENT, ramRegion, store64 } from "../support/guest.ts";
import { FakePinner } from "../support/pinner.ts";

/** Guest RAM: the driver's memory, other memory, memory in firmware's window, and memory with a leaf of its own. */
export const BLOCKS = [0, 32, 240, 1024];
export const BLOCK_FRAMES = 16;
const LEAVES = 2;
/** The IOMMU's table ends behind the frames of all leaves. */
const IOMMU_FRAMES = 1024 * LEAVES;
const FRAMES = Array.from({ length: IOMMU_FRAMES }, (_, gfn) => gfn as Gfn);
const RAM = FRAMES.filter((gfn) => BLOCKS.some((first) => first <= gfn && gfn < first + BLOCK_FRAMES));
const QUOTA = 50;
/** By two bits of the device's options. */
const SPECULATIONS = ["off", "neighbours,budget=8", "ghost,budget=8,judged=40", "stride,repeats=1"];
/** Guest memory accesses that one record may cost: 20 requests of 15 ranges of all of RAM, and then some. */
const STEPS_MAX = 100_000;

/** What must never happen has. */
export class OracleError extends Error {}
export function check(condition: boolean, otherwise: string): void {
  if (!condition) throw new OracleError(otherwise);
}

/** Parts that a broken twin replaces. */
export interface DeviceParts {
  readonly memory?: typeof GuestMemory;
  readonly iommu?: typeof SoftwareIommu;
  readonly tracker?: Partial<TrackerOptions>;
}

/** Run `input` and look after every record; throws what is wrong. */
export function fuzzDevice(
  input: Uint8Array,
  parts: DeviceParts = {},
  onRecord: (served: Served) => void = () => {},
): void {
  const device = new FuzzedDevice(input, parts);
  for (let record = device.serve(); record; record = device.serve()) {
    onRecord(record);
    device.check(record);
  }
  device.end();
}

class FuzzedDevice {
  readonly #memory: GuestMemory;
  readonly #host = new CheckedPinner();
  readonly #clock = new FakeClock(0, 1e5);
  readonly #gate: DeviceGate;
  /** A device that is not assigned, so that it is in bypass whatever the guest asks for. */
  readonly #oracle: DeviceGate;
  readonly #tracker: Tracker;
  readonly #device: VirtioIommu;
  readonly #function: VirtioPciFunction;
  readonly #pipe: PipeServer;
  /** What each block of RAM is backed by; undefined: it is not there. */
  readonly #blocks: (GuestRegion | undefined)[] = BLOCKS.map(() => undefined);
  #version = 0;
  #windowOpen = false;
  #steps = 0;
  /** The host refused a release since the beginning: pins may outlive their frames. */
  #refused = false;
  /** The guest spoilt its own ring or table, so that nothing is promised to it. */
  #spoilt = true;
  /** The driver has told the device, since it was reset, where its table and bitmap are. */
  #tableGiven = false;
  /** Heads that the device has to answer, in order. */
  #waiting: number[] = [];
  /** Where a device has just met a DMA fault, and how many event buffers the driver has left. */
  #faulted: number | undefined;
  #eventBuffers = 0;

  constructor(input: Uint8Array, parts: DeviceParts) {
    this.#memory = this.#countedMemory(parts.memory ?? GuestMemory);
    const buffer = createIommuBuffer(IOMMU_FRAMES);
    const iommu = new (parts.iommu ?? SoftwareIommu)(buffer, this.#clock);
    this.#gate = new DeviceGate(buffer, 0, () =>
      iommu.serveRequests((...asked) => this.#tracker.touched(...asked)),
    );
    this.#oracle = new DeviceGate(buffer, DEVICES_MAX - 1, () => {});
    iommu.setFaultCapable(0, ((input[0] ?? 0) & 2) !== 0);
    this.#tracker = new Tracker({
      memory: this.#memory,
      pinner: this.#host,
      iommu,
      policy: createPolicy("lru"),
      speculation: createSpeculation(SPECULATIONS[((input[0] ?? 0) >> 2) & 3]!),
      clock: this.#clock,
      counters: counters(TRACKING_COUNTERS, countersBuffer(TRACKING_COUNTERS)),
      quota: QUOTA,
      beforeActivation: (input[0] ?? 0) & 1 ? "none" : "bios",
      ...parts.tracker,
    });
    this.#device = new VirtioIommu({
      memory: this.#memory,
      tracker: this.#tracker,
      assigned: new Map([[PIPE_ENDPOINT as Bdf, 0]]),
      pinPage: true,
      hostError: () => {},
    });
    this.#function = new VirtioPciFunction(this.#device, this.#memory);
    this.#pipe = new PipeServer({
      read: reader(input.subarray(1)),
      function: this.#function,
      memory: this.#memory,
      table: this.#driversTable(),
      host: this.#hostPorts(),
    });
    this.#setMemory(15, 0);
  }

  serve(): Served | undefined {
    this.#steps = 0;
    this.#faulted = undefined;
    return this.#pipe.serve();
  }

  /** With a host that does its part again, a machine reset leaves nothing behind but firmware's window. */
  end(): void {
    this.#host.pagesMax = this.#host.releasesMax = Number.POSITIVE_INFINITY;
    if (this.#windowOpen) this.#gate.leave();
    this.#windowOpen = false;
    this.#function.reset();
    const allowed = this.#allowed(FRAMES);
    check(this.#host.pages.size === allowed.length, "pins of no frame are left after a machine reset");
  }

  #countedMemory(Memory: typeof GuestMemory): GuestMemory {
    const count = () => {
      if (++this.#steps > STEPS_MAX) throw new Error(`more than ${STEPS_MAX} steps for one record`);
    };
    return new (class Counted extends Memory {
      override transfer(...args: Parameters<GuestMemory["transfer"]>): void {
        count();
        super.transfer(...args);
      }
      override load16(gpa: number): number {
        count();
        return super.load16(gpa);
      }
      override load32(gpa: number): number {
        count();
        return super.load32(gpa);
      }
    })();
  }

  // --- the guest and the host ------------------------------------------------------------------------------------------

  #driversTable() {
    const memory = this.#memory;
    const unit = (gfn: number) => new DmaTrackingTable(memory, PIPE_DRIVER.table as Gpa, 2).walk(gfn as Gfn);
    return {
      build(): number {
        memory.write(PIPE_DRIVER.table, new Uint8Array((1 + LEAVES) * FRAME_SIZE));
        for (let i = 0; i < LEAVES; i++) {
          const leaf = PIPE_DRIVER.table + (1 + i) * FRAME_SIZE;
          store64(memory, PIPE_DRIVER.table + 8 * i, BigInt(leaf | ENTRY_PRESENT));
        }
        return 2;
      },
      map(gfn: number): boolean {
        const at = unit(gfn);
        if (at === NO_UNIT) return true;
        const before = memory.add32(at, 1);
        memory.or32(at, TU_ACCESSED);
        return (before & TU_PINNED) !== 0;
      },
      unmap(gfn: number): void {
        const at = unit(gfn);
        if (at !== NO_UNIT && memory.load32(at) & TU_COUNT) memory.add32(at, -1);
      },
    };
  }

  #hostPorts() {
    return {
      memoryMap: (present: number, moved: number) => this.#setMemory(present, moved),
      pass: (slices: number) => {
        this.#tracker.startPass();
        for (let i = 0; i < slices && this.#tracker.slice(); i++);
      },
      advance: (ms: number) => {
        this.#clock.time += ms * 1e6;
      },
      limitPins: (pages: number, errno: string) => {
        this.#host.pagesMax = this.#host.pages.size + pages;
        this.#host.errno = errno;
      },
      limitReleases: (pages: number) => {
        this.#host.releasesMax = pages;
        this.#refused ||= pages !== Number.POSITIVE_INFINITY;
      },
      toggleWindow: () => {
        if (this.#windowOpen) this.#gate.leave();
        else this.#gate.enter();
        this.#windowOpen = !this.#windowOpen;
        this.#refused = true;
      },
      touch: (gfn: number) => {
        if (this.#gate.allows(gfn as Gfn) || this.#gate.request(gfn as Gfn)) return;
        this.#gate.fault(gpaOf(gfn as Gfn), "read");
        this.#faulted = gpaOf(gfn as Gfn);
        this.#function.withQueue(EVENT_QUEUE, (queue) => this.#device.reportFaults(queue));
      },
    };
  }

  #setMemory(present: number, moved: number): void {
    BLOCKS.forEach((gfn, i) => {
      const there = (present & (1 << i)) !== 0;
      const keep = there && this.#blocks[i] && !(moved & (1 << i));
      if (keep) return;
      const base = HOST_BASE + this.#version++ * 2 ** 32;
      this.#blocks[i] = there ? ramRegion(gpaOf(gfn as Gfn), BLOCK_FRAMES, base) : undefined;
      if (i === 0) this.#spoilt = true;
    });
    const regions = this.#blocks.filter((r) => r !== undefined);
    this.#host.mayPin = (address) =>
      regions.some((r) => address >= r.hostAddress && address + FRAME_SIZE <= r.hostAddress + r.size);
    try {
      this.#tracker.setMemory(regions);
    } catch (error) {
      if (!(error instanceof HostError)) throw error;
    }
  }

  // --- the oracle --------------------------------------------------------------------------------------------------------

  check(served: Served): void {
    this.#checkPins();
    this.#checkAnswers(served);
    this.#checkEvents(served);
    if (!this.#spoilt && this.#tracker.active) this.#checkTable();
  }

  #allowed(gfns: readonly Gfn[]): Gfn[] {
    return gfns.filter((gfn) => this.#oracle.allows(gfn));
  }

  #checkPins(): void {
    const pinned = new Set(this.#host.pages.values());
    const allowed = this.#allowed(RAM);
    for (const gfn of allowed) {
      const block = this.#blocks[BLOCKS.findLastIndex((first) => first <= gfn)];
      if (!block) throw new OracleError(`the device may reach frame ${gfn}, which is not RAM`);
      if (!pinned.has(block.hostAddress + gpaOf(gfn) - block.gpa))
        throw new OracleError(`the device may reach frame ${gfn}, which the host has not pinned`);
    }
    const { size } = this.#host.pages;
    check(this.#tracker.pinned === size, "the ledger and the host disagree");
    check(allowed.length <= QUOTA, "more frames are pinned than the quota allows");
    check(this.#refused || allowed.length === size, "pages are pinned for no frame");
  }

  /** Each request that the driver offered is answered once, in order, by the time that the kick returns. */
  #checkAnswers(served: Served): void {
    const { opcode, sent, kicked, answers } = served;
    if (spoils(served)) this.#spoilt = true;
    // Without addresses the bitmap is written over the driver's queue.
    if (opcode === "pinControl" && !this.#tableGiven) this.#spoilt = true;
    if (opcode === "pinOn" || opcode === "start") this.#tableGiven = opcode === "pinOn";
    if (opcode === "start") this.#spoilt = this.#blocks[0] === undefined;
    if (opcode === "start" || opcode === "machineReset") this.#waiting = [];
    if (this.#spoilt) return;
    this.#waiting.push(...sent);
    const expected = kicked && this.#running ? this.#waiting.splice(0) : [];
    const heads = answers.map((a) => a.head);
    check(heads.join() === expected.join(), `requests ${expected} were answered as ${heads}`);
    if (opcode === "pin" || opcode === "map")
      for (const { written } of answers.slice(-sent.length))
        check(written === 4, "a PIN request has no status");
  }

  /** A device that faults is reported, once, while the driver has buffers. */
  #checkEvents({ opcode, events }: Served): void {
    if (opcode === "start") this.#eventBuffers = PIPE_EVENTS;
    if (this.#spoilt) return;
    const told = this.#faulted !== undefined && this.#eventBuffers > 0 && this.#running;
    if (told) this.#eventBuffers--;
    const expected = Fault.encode({
      flags: READ_OF_ADDRESS,
      endpoint: PIPE_ENDPOINT,
      address: this.#faulted ?? 0,
    });
    check(events.length === (told ? 1 : 0), `${events.length} faults are reported`);
    // The reason is what the device's addresses mean; they mean other things with bypass 0.
    for (const event of events)
      check(
        Buffer.compare(event.subarray(AFTER_REASON), expected.subarray(AFTER_REASON)) === 0,
        "a fault is reported that was not",
      );
  }

  get #running(): boolean {
    return this.#function.barRead(VirtioPciCommonCfg.fields.deviceStatus.at, 1) === RUNNING;
  }

  /** What the protocol is for: a driver that sees P may let a device at the frame. */
  #checkTable(): void {
    const table = new DmaTrackingTable(this.#memory, PIPE_DRIVER.table as Gpa, 2);
    for (const gfn of RAM) {
      const unit = table.walk(gfn);
      const seen = unit !== NO_UNIT && (table.load(unit) & TU_PINNED) !== 0;
      if (seen && !this.#oracle.allows(gfn))
        throw new OracleError(`frame ${gfn} has P, and the device may not reach it`);
    }
  }
}

const AFTER_REASON = Fault.fields.flags.at;
const READ_OF_ADDRESS = VIRTIO_IOMMU_FAULT_F_READ | VIRTIO_IOMMU_FAULT_F_ADDRESS;
const RUNNING = BigInt(VIRTIO_STATUS_DRIVER_OK | 1 | 2 | 8);

/** Whether the guest's own ring or table may be anything after this record. */
function spoils({ opcode, operands }: Served): boolean {
  if (opcode === "write") return Number(operands.gpa) < PIPE_DRIVER.events + FRAME_SIZE;
  if (opcode === "pinOn") return operands.levels !== 0 && operands.levels !== 2;
  return ["barWrite", "describe", "offer"].includes(opcode);
}

/** A host that knows what it may be asked to pin. */
class CheckedPinner extends FakePinner {
  mayPin: (address: number) => boolean = () => false;
  override pin(...[addresses, count, handles, pages]: Parameters<FakePinner["pin"]>): void {
    for (let i = 0; i < count; i++)
      for (let at = 0; at < (pages?.[i] ?? 1) * FRAME_SIZE; at += FRAME_SIZE) {
        const address = (addresses[i]! % PRESENT) + at;
        if (!this.mayPin(address))
          throw new OracleError(`the host is asked to pin 0x${address.toString(16)}, which is not guest RAM`);
      }
    super.pin(addresses, count, handles, pages);
  }
}

function reader(stream: Uint8Array): (size: number) => Uint8Array | undefined {
  let at = 0;
  return (size) => {
    if (at + size > stream.length) return undefined;
    at += size;
    return stream.subarray(at - size, at);
  };
}
