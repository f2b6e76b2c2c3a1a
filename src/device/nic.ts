import { DmaFault, NotGuestRam } from "../base/errors.ts";
import type { Iova } from "../base/units.ts";
import type { GuestAccess } from "../memory/guest-memory.ts";
import {
  COMMAND_DEXT,
  COMMAND_EOP,
  COMMAND_RS,
  DESCRIPTOR_SIZE,
  DESCRIPTOR_STATUS,
  ERROR_RXE,
  fillPacket,
  ReceiveDescriptor,
  STATUS_DD,
  STATUS_EOP,
  STATUS_TU,
  TRANSMIT_LENGTH_MAX,
  TransmitDescriptor,
} from "../wire/nic.ts";
import type { DeviceCounters } from "./counters.ts";

export interface NicRing {
  readonly iova: Iova;
  /** Descriptors. */
  readonly size: number;
}

export interface NicSetup {
  readonly receive: NicRing;
  readonly transmit: NicRing;
  /** Bytes of each receive buffer: RCTL.BSIZE. */
  readonly bufferSize: number;
  /** Where received packets come from: what was transmitted, or a generator of packets of so many bytes. */
  readonly source: "loopback" | { readonly length: number };
}

/** Sender numbers in packets. */
export const GENERATOR = 2;

/** Packets that wait to be received. When it is full, nothing is transmitted, so that none is dropped. */
const FIFO_PACKETS = 64;

interface Ring extends NicRing {
  head: number;
  tail: number;
}

/** What is still to be written into a descriptor: the IOMMU may forbid it for a while. */
interface WriteBack {
  readonly descriptor: number;
  readonly length: number | undefined;
  /** Status in the low byte; the next one is the errors of a receive descriptor. */
  readonly status: number;
}

/**
 * A network controller with one receive and one transmit ring of legacy 8254x descriptors. A ring that the IOMMU
 * forbids loses nothing; a packet whose data it forbids is lost, and its last descriptor says so.
 */
export class Nic {
  readonly #memory: GuestAccess;
  readonly #counters: DeviceCounters;
  #receive: Ring = { iova: 0 as Iova, size: 0, head: 0, tail: 0 };
  #transmit: Ring = this.#receive;
  #bufferSize = 0;
  #source: NicSetup["source"] = "loopback";
  #running = false;
  readonly #writeBacks: WriteBack[] = [];
  readonly #fifo: Uint8Array[] = [];
  #sequence = 0;
  /** The packet being transmitted. */
  #packet: { pieces: Uint8Array[]; length: number; bad: boolean } = empty();

  constructor(memory: GuestAccess, counters: DeviceCounters) {
    this.#memory = memory;
    this.#counters = counters;
  }

  start({ receive, transmit, bufferSize, source }: NicSetup): void {
    this.#receive = { ...receive, head: 0, tail: 0 };
    this.#transmit = { ...transmit, head: 0, tail: 0 };
    this.#bufferSize = bufferSize;
    this.#source = source;
    this.#fifo.length = this.#writeBacks.length = this.#sequence = 0;
    this.#packet = empty();
    this.#running = true;
  }

  /** No more DMA after this. Packets under way are dropped. */
  stop(): void {
    this.#running = false;
  }

  get stopped(): boolean {
    return !this.#running;
  }

  /** The tail registers: the index behind the last descriptor that the driver has given. */
  receive(tail: number): void {
    this.#setTail(this.#receive, tail);
  }

  transmit(tail: number): void {
    this.#setTail(this.#transmit, tail);
  }

  /** Take in at most `limit` transmit descriptors, and deliver at most as many packets. `more`: a limit was reached. */
  run(limit: number): { completed: number; more: boolean } {
    const sent = this.#repeat(limit, () => this.#send());
    const received = this.#repeat(limit, () => this.#deliver());
    return { completed: sent + received, more: sent === limit || received === limit };
  }

  #setTail(ring: Ring, tail: number): void {
    if (tail >= 0 && tail < ring.size) ring.tail = tail;
    else this.#counters.errors++;
  }

  #repeat(limit: number, step: () => boolean): number {
    let done = 0;
    try {
      while (this.#running && done < limit && this.#flush() && step()) done++;
      if (this.#running) this.#flush();
    } catch (error) {
      if (error instanceof DmaFault) this.#counters.faults++;
      else if (error instanceof NotGuestRam) {
        this.#counters.errors++;
        this.#running = false;
      } else throw error;
    }
    return done;
  }

  /** Write what is due into descriptors; always true, or it throws. */
  #flush(): true {
    for (let next = this.#writeBacks[0]; next; next = this.#writeBacks[0]) {
      if (next.length !== undefined) {
        const { length } = ReceiveDescriptor.fields;
        this.#memory.write(
          next.descriptor + length.at,
          ReceiveDescriptor.encode({ length: next.length }).subarray(length.at, length.at + length.size),
        );
      }
      // ORDERING: release, after data and length. PAIRS WITH the driver's load16 of the status.
      this.#memory.store16(next.descriptor + DESCRIPTOR_STATUS, next.status);
      this.#writeBacks.shift();
    }
    return true;
  }

  #send(): boolean {
    const ring = this.#transmit;
    if (ring.head === ring.tail || this.#fifo.length >= FIFO_PACKETS) return false;
    const at = ring.iova + ring.head * DESCRIPTOR_SIZE;
    const raw = new Uint8Array(DESCRIPTOR_SIZE);
    this.#memory.read(at, raw);
    ring.head = (ring.head + 1) % ring.size;
    const { address, length, command, checksumStart } = TransmitDescriptor.read(raw);
    const packet = this.#packet;
    packet.length += length;
    // Extended descriptors are not offered, and a packet is no longer than one descriptor may say.
    if (packet.bad || command & COMMAND_DEXT || packet.length > TRANSMIT_LENGTH_MAX) this.#spoil();
    else if (address !== 0 && length !== 0) this.#fetch(address, length);
    const bad = packet.bad;
    if (command & COMMAND_EOP) this.#emit();
    if (command & COMMAND_RS)
      this.#writeBacks.push({
        descriptor: at,
        length: undefined,
        status: STATUS_DD | (bad ? STATUS_TU : 0) | (checksumStart << 8),
      });
    return true;
  }

  #fetch(address: number, length: number): void {
    const piece = new Uint8Array(length);
    if (!this.#move(length, () => this.#memory.read(address, piece))) this.#spoil(false);
    else this.#packet.pieces.push(piece);
  }

  #spoil(count = true): void {
    if (count && !this.#packet.bad) this.#counters.errors++;
    this.#packet.bad = true;
    this.#packet.pieces.length = 0;
  }

  #emit(): void {
    const { pieces, bad } = this.#packet;
    this.#packet = empty();
    this.#counters.requests++;
    if (bad || this.#source !== "loopback") return;
    const packet = new Uint8Array(pieces.reduce((sum, p) => sum + p.length, 0));
    let done = 0;
    for (const piece of pieces) {
      packet.set(piece, done);
      done += piece.length;
    }
    if (packet.length > 0) this.#fifo.push(packet);
  }

  #deliver(): boolean {
    const ring = this.#receive;
    const length = this.#source === "loopback" ? this.#fifo[0]?.length : this.#source.length;
    const free = (ring.tail - ring.head + ring.size) % ring.size;
    const needed = length && Math.ceil(length / this.#bufferSize);
    if (!needed || needed > free) return false;
    const descriptors = Array.from({ length: needed }, (_, i) => {
      const at = ring.iova + ((ring.head + i) % ring.size) * DESCRIPTOR_SIZE;
      const raw = new Uint8Array(DESCRIPTOR_SIZE);
      this.#memory.read(at, raw);
      return { at, address: ReceiveDescriptor.read(raw).address };
    });
    // From here on the packet is gone, whatever becomes of it.
    const packet = this.#next();
    ring.head = (ring.head + needed) % ring.size;
    let bad = false;
    descriptors.forEach(({ at, address }, i) => {
      const piece = packet.subarray(i * this.#bufferSize, (i + 1) * this.#bufferSize);
      if (!this.#move(piece.length, () => this.#memory.write(address, piece))) bad = true;
      const last = i === needed - 1;
      const status = STATUS_DD | (last ? STATUS_EOP : 0) | (last && bad ? ERROR_RXE << 8 : 0);
      this.#writeBacks.push({ descriptor: at, length: piece.length, status });
    });
    this.#counters.requests++;
    return true;
  }

  #next(): Uint8Array {
    if (this.#source === "loopback") return this.#fifo.shift()!;
    const packet = new Uint8Array(this.#source.length);
    fillPacket(packet, this.#sequence++, GENERATOR);
    return packet;
  }

  /** Whether `access` moved `length` bytes of a packet; if not, the reason is counted. */
  #move(length: number, access: () => void): boolean {
    try {
      access();
    } catch (error) {
      if (error instanceof DmaFault) this.#counters.faults++;
      else if (error instanceof NotGuestRam) this.#counters.errors++;
      else throw error;
      return false;
    }
    this.#counters.transfers++;
    this.#counters.bytes += length;
    return true;
  }
}

const empty = () => ({ pieces: [] as Uint8Array[], length: 0, bad: false });
