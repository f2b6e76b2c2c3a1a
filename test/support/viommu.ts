import assert from "node:assert/strict";
import type { HostError } from "../../src/base/errors.ts";
import type { Gpa } from "../../src/base/units.ts";
import type { GuestMemory } from "../../src/memory/guest-memory.ts";
import type { Assigned } from "../../src/virtio/device.ts";
import { DriverQueue, layoutAt } from "../../src/virtio/driver-queue.ts";
import { VirtioIommu } from "../../src/virtio/iommu.ts";
import { type Buffer as GuestBuffer, SplitQueue } from "../../src/virtio/queue.ts";
import { Config, PIN_CONTROL_ON, PinRange, ReqPin } from "../../src/wire/virtio-iommu.ts";
import { type MachineOptions, machine } from "./machine.ts";

const bit = (n: number) => 1n << BigInt(n);
export const INPUT_RANGE = bit(0);
export const DOMAIN_RANGE = bit(1);
export const MAP_UNMAP = bit(2);
export const BYPASS = bit(3);
export const PROBE = bit(4);
export const BYPASS_CONFIG = bit(6);
export const PIN_PAGE = bit(16);
export const PIN_DIRTY = bit(17);
export const VERSION_1 = bit(32);
export const NEGOTIATED =
  VERSION_1 | INPUT_RANGE | DOMAIN_RANGE | MAP_UNMAP | PROBE | BYPASS_CONFIG | PIN_PAGE;

/** Status of a request: VIRTIO 1.2 section 5.13.6. */
export const OK = 0;
export const IOERR = 1;
export const UNSUPP = 2;
export const DEVERR = 3;
export const INVAL = 4;
export const RANGE = 5;
export const NOENT = 6;
export const FAULT = 7;
export const NOMEM = 8;

/** The assigned functions; the last one is behind another IOMMU. */
export const DISK = 0x20;
export const NIC = 0x103;
export const FOREIGN = 0x140;
const assignedFunctions = () =>
  new Map<number, number | undefined>([
    [DISK, 0],
    [NIC, 1],
    [FOREIGN, undefined],
  ]);
/** Where the driver keeps its bitmap, a request and the answer. */
export const BITMAP = 1900 * 4096;
export const REQUEST = 0x2_0000;
export const REPLY = 0x3_0000;
/** An address behind all RAM. */
export const NOT_RAM = 2 ** 40;
/** Event buffers that are the driver's own choice, one behind the other. */
const EVENTS = 0x4_0000;

export type ConfigField = keyof typeof Config.fields;
export const buffer = (gpa: number, length: number): GuestBuffer => ({ gpa: gpa as Gpa, length });

export interface ViommuOptions extends MachineOptions {
  readonly pinPage?: boolean;
}
export type Viommu = ReturnType<typeof viommu>;

/** The driver's accesses to the device configuration. */
function registers(device: VirtioIommu) {
  return {
    get(name: ConfigField): number {
      const { at, size } = Config.fields[name];
      const raw = new Uint8Array(size);
      device.configRead(at, raw);
      return raw.reduceRight((value, byte) => value * 256 + byte, 0);
    },
    set(name: ConfigField, value: number): void {
      const { at, size } = Config.fields[name];
      device.configWrite(at, Config.encode({ [name]: value }).subarray(at, at + size));
    },
  };
}

/** The driver's request queue. */
function requests(memory: GuestMemory, device: VirtioIommu) {
  const layout = layoutAt(0x1_0000, 64);
  const driver = new DriverQueue(memory, layout);
  const queue = new SplitQueue(memory, layout, { indirect: true });
  /** Send a request; returns the used length, and so much of the writable buffers. */
  const send = (
    request: Uint8Array,
    readable: readonly GuestBuffer[],
    writable: readonly GuestBuffer[],
  ): { written: number; reply: number[] } => {
    let done = 0;
    for (const { gpa, length } of readable) {
      memory.write(gpa, request.subarray(done, done + length));
      done += length;
    }
    driver.add(readable, writable);
    device.kick(0, queue);
    const { written } = driver.poll()!;
    let left = written;
    const reply = writable.flatMap(({ gpa, length }) => {
      const part = new Uint8Array(Math.min(left, length));
      memory.read(gpa, part);
      left -= part.length;
      return [...part];
    });
    return { written, reply };
  };
  /** Send a request in one buffer, with room for `room` bytes of answer; returns the answer's status. */
  const status = (request: Uint8Array, room = 4): number => {
    const { written, reply } = send(request, [buffer(REQUEST, request.length)], [buffer(REPLY, room)]);
    assert.deepEqual([written, ...reply.slice(1)], [4, 0, 0, 0]);
    return reply[0]!;
  };
  const pin = (...gfns: number[]): number => status(pinRequest(gfns.map((gfn) => [gfn, 1])));
  return { driver, queue, send, status, pin };
}

/** The driver's event queue. */
function eventQueue(memory: GuestMemory, device: VirtioIommu) {
  const layout = layoutAt(0x1_4000, 16);
  const events = new DriverQueue(memory, layout);
  const queue = new SplitQueue(memory, layout);
  /** Where each buffer begins, by its head. */
  const eventBuffers = new Map<number, number>();
  return {
    events,
    eventQueue: queue,
    eventBuffers,
    giveEvent(writable?: readonly GuestBuffer[], readable: readonly GuestBuffer[] = []): void {
      const own = [buffer(EVENTS + 64 * eventBuffers.size, 24)];
      const head = events.add(readable, writable ?? own);
      eventBuffers.set(head, writable ? REPLY : own[0]!.gpa);
    },
    reportFaults: () => device.reportFaults(queue),
  };
}

/** The device over a real tracker and a fake host, with its driver. Frames 0 to 1,023 have units. */
export function viommu({ pinPage = true, ...options }: ViommuOptions = {}) {
  const m = machine(options);
  m.table.unit(0);
  const { memory, tracker } = m;
  const hostErrors: HostError[] = [];
  const functions = assignedFunctions();
  const device = new VirtioIommu({
    memory,
    tracker,
    assigned: functions as ReadonlyMap<number, number | undefined> as Assigned,
    pinPage,
    hostError: (error) => hostErrors.push(error),
  });
  const { get, set } = registers(device);
  return {
    ...m,
    ...requests(memory, device),
    ...eventQueue(memory, device),
    functions,
    device,
    hostErrors,
    get,
    set,
    /** A driver's way to PIN on. Returns pin_status. */
    on({
      features = NEGOTIATED,
      root = m.table.root as number,
      levels = 2,
      bitmap = BITMAP,
      flags = 1,
    } = {}): number {
      device.start(features);
      set("assignedBitmap", bitmap);
      set("dttRoot", root);
      set("dttLevels", levels);
      set("pinFlags", flags);
      set("pinControl", PIN_CONTROL_ON);
      return get("pinStatus");
    },
    /** BDFs in the driver's bitmap. */
    assigned(): number[] {
      const raw = new Uint8Array(8192);
      memory.read(BITMAP, raw);
      return Array.from({ length: 65_536 }, (_, bdf) => bdf).filter(
        (bdf) => raw[bdf >> 3]! & (1 << (bdf & 7)),
      );
    },
  };
}

/** The same, with PIN on. */
export function activeViommu(options: ViommuOptions = {}): Viommu {
  const r = viommu(options);
  assert.equal(r.on(), 1);
  return r;
}

export function pinRequest(
  ranges: readonly (readonly [gfn: number, nrFrames: number, reserved?: number])[],
  head: { endpoint?: number; flags?: number; nrRanges?: number; headReserved?: Uint8Array } = {},
): Uint8Array {
  const request = ReqPin.encode(
    { type: 0x40, endpoint: DISK, nrRanges: ranges.length, ...head },
    PinRange.size * ranges.length,
  );
  for (const [i, [gfn, nrFrames, reserved = 0]] of ranges.entries())
    PinRange.write(request, { gfn, nrFrames, reserved }, ReqPin.size + i * PinRange.size);
  return request;
}
