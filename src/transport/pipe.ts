import { NotGuestRam } from "../base/errors.ts";
import type { Gpa } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import type { PciFunction } from "../virtio/device.ts";
import { DriverQueue, layoutAt } from "../virtio/driver-queue.ts";
import type { Buffer } from "../virtio/queue.ts";
import {
  VIRTIO_F_VERSION_1,
  VIRTIO_STATUS_ACKNOWLEDGE,
  VIRTIO_STATUS_DRIVER,
  VIRTIO_STATUS_DRIVER_OK,
  VIRTIO_STATUS_FEATURES_OK,
  VirtioPciCommonCfg,
} from "../wire/pci.ts";
import {
  PIPE_OPCODES,
  PIPE_RECORDS,
  type PipeOpcode,
  type PipeOperands,
  PipeRange,
  pipeRanges,
  pipeTail,
} from "../wire/pipe.ts";
import {
  Config,
  Fault,
  PIN_CONTROL_ON,
  PinRange,
  ReqPin,
  VIRTIO_IOMMU_F_BYPASS_CONFIG,
  VIRTIO_IOMMU_F_PIN_PAGE,
  VIRTIO_IOMMU_F_PROBE,
  VIRTIO_IOMMU_T_PIN,
} from "../wire/virtio-iommu.ts";

/** Where the driver of a pipe keeps what it shares with the device: all in the first 64 KiB of guest RAM. */
export const PIPE_DRIVER = {
  queue: 0x1000,
  /** The i-th request under way is at `requests` + 256 i, its answer at `answers` + 256 i. */
  requests: 0x2000,
  answers: 0x4000,
  bitmap: 0x6000,
  /** The root of its table; the table's other pages follow. */
  table: 0x8000,
  eventQueue: 0xb000,
  events: 0xc000,
} as const;
const SLOT = 256;
/** As many as the request queue can hold at three descriptors each. */
const REQUESTS_MAX = 20;
const QUEUE_SIZE = 64;
/** Event buffers, which the driver gives when it starts, and not again. */
export const PIPE_EVENTS = 16;

const BAR = { common: 0, device: 0x2000, notify: 0x3000 };
const bit = (n: number) => 1n << BigInt(n);

export interface PipePorts {
  /** The next `size` bytes of the stream; undefined when it has fewer. */
  read(size: number): Uint8Array | undefined;
  readonly function: PciFunction;
  /** RAM as the guest has it. */
  readonly memory: GuestMemory;
  /** The driver's table at PIPE_DRIVER.table. */
  readonly table: {
    /** Empty, but for the tables above the units of all of the guest's frames. Returns its levels. */
    build(): number;
    /** Count a mapping; true when P is set, or when the table has no unit for it. */
    map(gfn: number): boolean;
    unmap(gfn: number): void;
  };
  readonly host: {
    /** Blocks of guest RAM that are there, and those that other memory is behind from now on; a bit each. */
    memoryMap(present: number, moved: number): void;
    pass(slices: number): void;
    advance(ms: number): void;
    limitPins(pages: number, errno: string): void;
    limitReleases(pages: number): void;
    toggleWindow(): void;
    touch(gfn: number): void;
  };
}

/** A record, and what it did at the request queue. */
export interface Served {
  readonly opcode: PipeOpcode;
  readonly operands: Readonly<Record<string, number | bigint>>;
  /** Heads that the driver offered. */
  readonly sent: readonly number[];
  readonly kicked: boolean;
  readonly answers: readonly { readonly head: number; readonly written: number }[];
  /** What the device has written into event buffers. */
  readonly events: readonly Uint8Array[];
}

/**
 * A PCI function served from a stream of bytes (stdin, a fuzzer's buffer), with a guest and a host around it that do
 * what the bytes say: src/wire/pipe.ts has the records. Every string of bytes is a program; a truncated record ends it.
 */
export class PipeServer {
  readonly #p: PipePorts;
  #driver: DriverQueue | undefined;
  #events: DriverQueue | undefined;
  #sent: number[] = [];
  #kicked = false;
  /** Heads of the requests that the driver waits for. */
  readonly #waiting = new Set<number>();
  /** By their heads. */
  readonly #eventBuffers = new Map<number, Gpa>();
  #requests = 0;

  constructor(ports: PipePorts) {
    this.#p = ports;
  }

  /** Serve one record; undefined at the end of the stream. */
  serve(): Served | undefined {
    const code = this.#p.read(1);
    if (!code) return undefined;
    const opcode = PIPE_OPCODES[code[0]! % PIPE_OPCODES.length]!;
    const raw = this.#p.read(PIPE_RECORDS[opcode].size);
    if (!raw) return undefined;
    const operands = PIPE_RECORDS[opcode].read(raw);
    const tail = this.#p.read(pipeTail(opcode, operands));
    if (!tail) return undefined;
    this.#sent = [];
    this.#kicked = false;
    (this.#serve[opcode] as (operands: object, tail: Uint8Array) => void)(operands, tail);
    return {
      opcode,
      operands,
      sent: this.#sent,
      kicked: this.#kicked,
      answers: this.#answers(),
      events: this.#takeEvents(),
    };
  }

  readonly #serve: { readonly [K in PipeOpcode]: (o: PipeOperands<K>, tail: Uint8Array) => void } = {
    configRead: ({ offset, size }) => void this.#p.function.configRead(offset, Math.min(4, 1 << (size & 3))),
    configWrite: ({ offset, size, value }) =>
      this.#p.function.configWrite(offset, Math.min(4, 1 << (size & 3)), Number(value & 0xffff_ffffn)),
    barRead: ({ offset, size }) => void this.#p.function.barRead(offset, 1 << (size & 3)),
    barWrite: ({ offset, size, value }) => this.#p.function.barWrite(offset, 1 << (size & 3), value),
    machineReset: () => this.#p.function.reset(),
    memoryMap: ({ amount }) => this.#p.host.memoryMap(amount & 15, amount >> 4),

    write: ({ gpa }, tail) => this.#guest(() => this.#p.memory.write(gpa, tail)),
    start: ({ without }) => this.#start(without),
    pinOn: ({ levels, flags }) => this.#pinOn(levels, flags),
    pinControl: ({ amount }) => this.#config("pinControl", amount),
    map: ({ gfn }) => {
      if (!this.#p.table.map(gfn)) this.#pin(0, [{ gfn, nrFrames: 1 }]);
    },
    unmap: ({ gfn }) => this.#p.table.unmap(gfn),
    pin: ({ endpoint, count }, tail) =>
      this.#pin(
        endpoint,
        Array.from({ length: pipeRanges(count) }, (_, i) => PipeRange.read(tail, i * PipeRange.size)),
      ),
    send: ({ hold, room, split }, tail) => this.#send(tail, room, split, (hold & 1) === 1),
    describe: ({ index, ...desc }) => this.#guest(() => this.#driver?.describe(index % QUEUE_SIZE, desc)),
    offer: ({ head }) => this.#guest(() => this.#driver?.offer(head)),
    kick: ({ amount }) => this.#kick(amount),

    pass: ({ amount }) => this.#p.host.pass(amount || Number.POSITIVE_INFINITY),
    advance: ({ amount }) => this.#p.host.advance(amount),
    hostPins: ({ pages, errno }) => this.#p.host.limitPins(limit(pages), errno & 1 ? "EPERM" : "ENOMEM"),
    hostReleases: ({ amount }) => this.#p.host.limitReleases(limit(amount)),
    window: () => this.#p.host.toggleWindow(),
    touch: ({ gfn }) => this.#p.host.touch(gfn),
  };

  /** VIRTIO 1.2 section 3.1.1, step by step; a feature that is taken away may make the device refuse. */
  #start(without: number): void {
    const features = [
      VIRTIO_F_VERSION_1,
      VIRTIO_IOMMU_F_PIN_PAGE,
      VIRTIO_IOMMU_F_BYPASS_CONFIG,
      VIRTIO_IOMMU_F_PROBE,
    ]
      .filter((_, i) => (without & (1 << i)) === 0)
      .reduce((mask, n) => mask | bit(n), 0n);
    this.#waiting.clear();
    let status = VIRTIO_STATUS_ACKNOWLEDGE | VIRTIO_STATUS_DRIVER;
    this.#common("deviceStatus", 0n);
    for (const half of [0n, 1n]) {
      this.#common("driverFeatureSelect", half);
      this.#common("driverFeature", (features >> (32n * half)) & 0xffff_ffffn);
    }
    status |= VIRTIO_STATUS_FEATURES_OK;
    this.#common("deviceStatus", BigInt(status));
    this.#driver = this.#setUpQueue(0, PIPE_DRIVER.queue, QUEUE_SIZE);
    const events = this.#setUpQueue(1, PIPE_DRIVER.eventQueue, PIPE_EVENTS);
    this.#events = events;
    this.#eventBuffers.clear();
    this.#guest(() => {
      for (let i = 0; i < PIPE_EVENTS; i++) {
        const gpa = (PIPE_DRIVER.events + i * Fault.size) as Gpa;
        this.#eventBuffers.set(events.add([], [{ gpa, length: Fault.size }]), gpa);
      }
    });
    this.#common("deviceStatus", BigInt(status | VIRTIO_STATUS_DRIVER_OK));
  }

  #setUpQueue(index: number, gpa: number, size: number): DriverQueue {
    const layout = layoutAt(gpa, size);
    this.#guest(() => this.#p.memory.write(layout.desc, new Uint8Array(layout.bytes)));
    this.#common("queueSelect", BigInt(index));
    this.#common("queueSize", BigInt(size));
    this.#common("queueDesc", BigInt(layout.desc));
    this.#common("queueDriver", BigInt(layout.driver));
    this.#common("queueDevice", BigInt(layout.device));
    this.#common("queueEnable", 1n);
    return new DriverQueue(this.#p.memory, layout);
  }

  /** Reports in buffers that the driver has given; a ring that it has spoilt may name others, and without end. */
  #takeEvents(): Uint8Array[] {
    const events: Uint8Array[] = [];
    this.#guest(() => {
      for (let n = 0; n < PIPE_EVENTS; n++) {
        const used = this.#events?.poll();
        if (!used) return;
        const gpa = this.#eventBuffers.get(used.head);
        if (gpa === undefined) continue;
        const event = new Uint8Array(Math.min(used.written, Fault.size));
        this.#p.memory.read(gpa, event);
        events.push(event);
      }
    });
    return events;
  }

  /** `levels` 0: those of the table that is built. */
  #pinOn(levels: number, flags: number): void {
    let built = 0;
    this.#guest(() => {
      built = this.#p.table.build();
    });
    this.#config("assignedBitmap", PIPE_DRIVER.bitmap);
    this.#config("dttRoot", PIPE_DRIVER.table);
    this.#config("dttLevels", levels || built);
    this.#config("pinFlags", flags);
    this.#config("pinControl", PIN_CONTROL_ON);
  }

  /** `endpoint` is relative to the first one that is assigned. */
  #pin(endpoint: number, ranges: readonly { readonly gfn: number; readonly nrFrames: number }[]): void {
    const head = { type: VIRTIO_IOMMU_T_PIN, endpoint: PIPE_ENDPOINT + endpoint, nrRanges: ranges.length };
    const request = ReqPin.encode(head, ranges.length * PinRange.size);
    ranges.forEach((r, i) => void PinRange.write(request, r, ReqPin.size + i * PinRange.size));
    this.#send(request, 4, 0, false);
  }

  #send(request: Uint8Array, room: number, split: number, hold: boolean): void {
    const driver = this.#driver;
    // Without its own memory the driver cannot even build a request.
    if (!driver || this.#waiting.size >= REQUESTS_MAX || !this.#p.memory.find(0, PIPE_DRIVER.table)) return;
    const slot = SLOT * (this.#requests++ % REQUESTS_MAX);
    const gpa = PIPE_DRIVER.requests + slot;
    const part = (at: number, length: number): Buffer[] => (length ? [{ gpa: at as Gpa, length }] : []);
    const first = Math.min(split, request.length);
    const readable = [...part(gpa, first), ...part(gpa + first, request.length - first)];
    const writable = part(PIPE_DRIVER.answers + slot, room);
    if (readable.length + writable.length === 0) return;
    this.#p.memory.write(gpa, request);
    const head = driver.add(readable, writable);
    this.#sent.push(head);
    this.#waiting.add(head);
    if (!hold) this.#kick(0);
  }

  #kick(queue: number): void {
    this.#kicked = queue === 0;
    this.#p.function.barWrite(BAR.notify + 4 * queue, 2, BigInt(queue));
  }

  #answers(): Served["answers"] {
    const answers: { head: number; written: number }[] = [];
    // A guest that writes into its own ring may find answers there without end.
    this.#guest(() => {
      for (
        let answer = this.#driver?.poll();
        answer && answers.length < QUEUE_SIZE;
        answer = this.#driver?.poll()
      )
        answers.push(answer);
    });
    for (const { head } of answers) this.#waiting.delete(head);
    return answers;
  }

  #common(name: keyof typeof VirtioPciCommonCfg.fields, value: bigint): void {
    const { at, size } = VirtioPciCommonCfg.fields[name];
    this.#p.function.barWrite(BAR.common + at, size, value);
  }

  #config(name: keyof typeof Config.fields, value: number): void {
    const { at, size } = Config.fields[name];
    this.#p.function.barWrite(BAR.device + at, size, BigInt(value));
  }

  /** What the guest's own code does to memory that it does not have is nobody's problem. */
  #guest(action: () => void): void {
    try {
      action();
    } catch (error) {
      if (!(error instanceof NotGuestRam)) throw error;
    }
  }
}

/** The function that a pipe's requests are for. */
export const PIPE_ENDPOINT = 0x20;

const limit = (pages: number): number => (pages === 255 ? Number.POSITIVE_INFINITY : pages);
