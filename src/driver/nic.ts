import { invariant } from "../base/errors.ts";
import {
  COMMAND_EOP,
  COMMAND_RS,
  DESCRIPTOR_SIZE,
  DESCRIPTOR_STATUS,
  ERROR_RXE,
  ReceiveDescriptor,
  STATUS_DD,
  STATUS_EOP,
  STATUS_TU,
  TransmitDescriptor,
} from "../wire/nic.ts";
import { type DmaBuffer, DmaMapFailed, type DmaSegment } from "./dma-api.ts";
import type { ReceiveBuffer, ReceiveBuffers } from "./receive-buffers.ts";
import { DescriptorRing, type RingOptions } from "./ring.ts";

/**
 * The controller's registers.
 *
 * ORDERING: tails are release writes; the descriptors before them are visible to the device first.
 */
export interface NicPort {
  receive(tail: number): void;
  transmit(tail: number): void;
  /** No more DMA: takes effect when `stopped` is true, as a reset of the controller does. */
  stop(): void;
  readonly stopped: boolean;
}

interface QueueOptions extends RingOptions {
  readonly port: NicPort;
}

export interface ReceiverOptions extends QueueOptions {
  readonly buffers: ReceiveBuffers;
  /** A packet, valid during the call, or undefined for one that the device lost. */
  received(packet: Uint8Array | undefined): void;
}

const PACKET_MAX = 16_384;

/** The receive ring: kept as full as mappings can be had. */
export class Receiver {
  readonly ring: DescriptorRing;
  mapFailures = 0;
  readonly #options: ReceiverOptions;
  /** Buffers of the used descriptors, from the head on. */
  readonly #given: ReceiveBuffer[] = [];
  readonly #packet = new Uint8Array(PACKET_MAX);
  #length = 0;

  /** Throws DmaMapFailed. */
  constructor(options: ReceiverOptions) {
    this.#options = options;
    this.ring = new DescriptorRing(options, DESCRIPTOR_SIZE, DESCRIPTOR_STATUS);
  }

  /** Take in what the device has received, up to `limit` descriptors, and refill. Returns how many it took. */
  poll(limit: number): number {
    let taken = 0;
    while (taken < limit && this.#given.length > 0 && this.ring.status() & STATUS_DD) {
      this.#take();
      taken++;
    }
    this.#refill();
    return taken;
  }

  /** The device is stopped. */
  close(): void {
    const { buffers } = this.#options;
    for (const buffer of this.#given) {
      buffers.received(buffer);
      buffers.release(buffer);
    }
    this.#given.length = 0;
    buffers.close();
    this.ring.close();
  }

  #take(): void {
    const { memory, buffers, received } = this.#options;
    const { length, status, errors } = ReceiveDescriptor.read(this.ring.take());
    const buffer = this.#given.shift()!;
    buffers.received(buffer);
    const size = Math.min(length, buffers.size, PACKET_MAX - this.#length);
    memory.read(buffer.gpa, this.#packet.subarray(this.#length, this.#length + size));
    this.#length += size;
    buffers.release(buffer);
    if (!(status & STATUS_EOP)) return;
    const packet = this.#packet.subarray(0, this.#length);
    this.#length = 0;
    received(errors & ERROR_RXE ? undefined : packet);
  }

  #refill(): void {
    const { buffers, port } = this.#options;
    const before = this.ring.tail;
    try {
      while (this.ring.room > 0) {
        const buffer = buffers.take();
        if (!buffer) break;
        this.#given.push(buffer);
        this.ring.give(ReceiveDescriptor.encode({ address: buffer.iova }));
      }
    } catch (error) {
      if (!(error instanceof DmaMapFailed)) throw error;
      this.mapFailures++;
    }
    if (this.ring.tail !== before) port.receive(this.ring.tail);
  }
}

export interface Packet {
  /** What Linux calls the head and the fragments. */
  readonly buffers: readonly DmaBuffer[];
  /** Called from poll() when the buffers are unmapped. */
  done(sent: boolean): void;
}

/** The transmit ring. Packets wait in order for room and for their mappings. */
export class Transmitter {
  readonly ring: DescriptorRing;
  mapFailures = 0;
  readonly #options: QueueOptions;
  readonly #waiting: Packet[] = [];
  readonly #sent: { readonly packet: Packet; readonly segments: readonly DmaSegment[] }[] = [];

  /** Throws DmaMapFailed. */
  constructor(options: QueueOptions) {
    this.#options = options;
    this.ring = new DescriptorRing(options, DESCRIPTOR_SIZE, DESCRIPTOR_STATUS);
  }

  /** Packets that are not done. */
  get pending(): number {
    return this.#waiting.length + this.#sent.length;
  }

  /** Has at most as many buffers as the ring holds. */
  send(packet: Packet): void {
    invariant(
      packet.buffers.length > 0 && packet.buffers.length < this.ring.size,
      "a packet fits into the ring",
    );
    this.#waiting.push(packet);
    this.#start();
  }

  /** Returns how many packets are done. */
  poll(): number {
    let done = 0;
    for (let next = this.#sent[0]; next; next = this.#sent[0]) {
      // Only the last descriptor of a packet asks for its status (RS).
      const status = this.ring.status(next.segments.length - 1);
      if (!(status & STATUS_DD)) break;
      for (const _ of next.segments) this.ring.take();
      this.#sent.shift();
      this.#unmap(next.segments);
      next.packet.done((status & STATUS_TU) === 0);
      done++;
    }
    this.#start();
    return done;
  }

  /** The device is stopped. Packets that it has not sent are done, and not sent. */
  close(): void {
    for (const { packet, segments } of this.#sent) {
      this.#unmap(segments);
      packet.done(false);
    }
    for (const packet of this.#waiting) packet.done(false);
    this.#sent.length = this.#waiting.length = 0;
    this.ring.close();
  }

  #start(): void {
    const before = this.ring.tail;
    for (
      let next = this.#waiting[0];
      next && next.buffers.length <= this.ring.room;
      next = this.#waiting[0]
    ) {
      const segments = this.#map(next.buffers);
      if (!segments) break;
      this.#waiting.shift();
      segments.forEach(({ iova, length }, i) => {
        const command = i === segments.length - 1 ? COMMAND_EOP | COMMAND_RS : 0;
        this.ring.give(TransmitDescriptor.encode({ address: iova, length, command }));
      });
      this.#sent.push({ packet: next, segments });
    }
    if (this.ring.tail !== before) this.#options.port.transmit(this.ring.tail);
  }

  /** One mapping each, as drivers do for head and fragments. */
  #map(buffers: readonly DmaBuffer[]): DmaSegment[] | undefined {
    const segments: DmaSegment[] = [];
    try {
      for (const { gpa, length } of buffers)
        segments.push({ iova: this.#options.dma.mapSingle(gpa, length, "to-device"), length });
      return segments;
    } catch (error) {
      this.#unmap(segments);
      if (!(error instanceof DmaMapFailed)) throw error;
      this.mapFailures++;
      return undefined;
    }
  }

  #unmap(segments: readonly DmaSegment[]): void {
    for (const { iova, length } of segments) this.#options.dma.unmapSingle(iova, length, "to-device");
  }
}
