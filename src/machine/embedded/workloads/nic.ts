import { type Random, random } from "../../../base/random.ts";
import { FRAME_SIZE, type Gpa } from "../../../base/units.ts";
import type { DmaBuffer } from "../../../driver/dma-api.ts";
import { FrameCache } from "../../../driver/frames.ts";
import { type NicPort, Receiver, Transmitter } from "../../../driver/nic.ts";
import { type ReceiveBuffers, receiveBuffers } from "../../../driver/receive-buffers.ts";
import { fillPacket, isPacket, PACKET_LENGTH_MIN, sequenceOf } from "../../../wire/nic.ts";
import type { NicWorkload as NicWorkloadText } from "../../workload-text.ts";
import { Latencies } from "./latencies.ts";
import { type Guest, type GuestWorkload, type Measurement, measurement } from "./workload.ts";

export interface NicOptions {
  readonly guest: Guest;
  readonly port: NicPort;
  readonly workload: NicWorkloadText;
  /** Who the generator says it is; in loopback it is this driver. */
  readonly sender: number;
  /** Descriptors of each ring. */
  readonly ringSize: number;
  /** Frames for receive buffers and fragments. */
  readonly cacheFrames: number;
}

type Phase = "measured" | "drain" | "stopping" | "finished";

const BUDGET = 64;
/** Packets sent and not yet received. */
const IN_FLIGHT_MAX = 64;
/** Bytes of a head: several of them share a frame, and so COUNT. */
const HEAD_BYTES = 256;
const FRAGMENTS_MAX = 3;
/** What is not received so long after the end is lost. */
const DRAIN_NS = 1e9;

/**
 * Packets through a network controller, received only or sent and received. Each carries its number; every byte of
 * it is compared, and none may be missing, repeated or out of order unless the device said that it lost one.
 */
export class NicWorkload implements GuestWorkload {
  readonly measurement: Measurement;
  readonly receiver: Receiver;
  readonly transmitter: Transmitter;
  readonly buffers: ReceiveBuffers;
  readonly #options: NicOptions;
  readonly #next: Random;
  readonly #cache: FrameCache;
  readonly #heads: Heads;
  readonly #latencies = new Latencies();
  readonly #began: number;
  #phase: Phase = "measured";
  #drainBegan = 0;
  #stopped = false;
  #sent = 0;
  /** Numbers that may come next or are overdue, with the time they were sent. */
  readonly #awaited = new Map<number, number>();
  #expected = 0;
  /** Packets that the device said it lost or that were wrong, and numbers that were skipped. */
  #lost = 0;
  #skipped = 0;

  /** Throws DmaMapFailed when there are no rings. The device is started with them before the first poll(). */
  constructor(options: NicOptions) {
    const { guest, port, workload, ringSize, cacheFrames } = options;
    const { memory, dma, pages, seed, clock } = guest;
    this.#options = options;
    this.#next = random(seed);
    this.#cache = new FrameCache(pages, cacheFrames, this.#next);
    this.#heads = new Heads(this.#cache);
    this.buffers = receiveBuffers(workload.mode, dma, this.#cache);
    const ring = { memory, dma, port, size: ringSize };
    this.receiver = new Receiver({
      ...ring,
      buffers: this.buffers,
      received: (packet) => this.#received(packet),
    });
    try {
      this.transmitter = new Transmitter(ring);
    } catch (error) {
      this.receiver.close();
      throw error;
    }
    this.measurement = measurement(this.#latencies);
    this.#began = clock.now();
  }

  get finished(): boolean {
    return this.#phase === "finished";
  }

  stop(): void {
    this.#stopped = true;
  }

  poll(): boolean {
    if (this.finished) return false;
    if (this.#phase === "stopping") return this.#finish();
    const done = this.receiver.poll(BUDGET) + this.transmitter.poll();
    this.measurement.mapFailures = this.receiver.mapFailures + this.transmitter.mapFailures;
    const now = this.#options.guest.clock.now();
    if (this.#phase === "drain") {
      if (this.#settled() || now - this.#drainBegan > DRAIN_NS) this.#quiesce();
      return done > 0;
    }
    const sent = this.#options.workload.traffic === "loopback" && this.#send();
    if (this.#stopped || now - this.#began >= this.#options.workload.seconds * 1e9) {
      this.measurement.nanoseconds = now - this.#began;
      this.#phase = "drain";
      this.#drainBegan = now;
    }
    return done > 0 || sent;
  }

  /** A generator never ends; what was sent has come back, or was lost as the device said. */
  #settled(): boolean {
    if (this.#options.workload.traffic === "receive") return true;
    return this.transmitter.pending === 0 && this.#awaited.size <= this.#lost;
  }

  #quiesce(): void {
    this.#phase = "stopping";
    this.#options.port.stop();
    // Each of these is a packet that is lost in the sense above, or one that is missing.
    const missing = this.#options.workload.traffic === "receive" ? this.#skipped : this.#awaited.size;
    if (missing > this.#lost) this.measurement.mismatches += missing - this.#lost;
  }

  #finish(): boolean {
    if (!this.#options.port.stopped) return false;
    this.transmitter.close();
    this.receiver.close();
    this.#heads.close();
    this.#cache.close();
    this.#phase = "finished";
    return true;
  }

  #received(packet: Uint8Array | undefined): void {
    if (!packet) {
      this.#lost++;
      this.measurement.errors++;
      return;
    }
    this.measurement.compared++;
    const { guest, workload, sender } = this.#options;
    const sequence = packet.length >= PACKET_LENGTH_MIN ? sequenceOf(packet) : -1;
    const sentAt = this.#awaited.get(sequence);
    const loopback = workload.traffic === "loopback";
    const inOrder = sequence >= this.#expected && (!loopback || sentAt !== undefined);
    if (!inOrder || packet.length !== workload.size || !isPacket(packet, sequence, sender)) {
      this.measurement.mismatches++;
      this.#lost++;
      return;
    }
    this.#skipped += sequence - this.#expected;
    this.#expected = sequence + 1;
    this.#awaited.delete(sequence);
    if (this.#phase !== "measured") return;
    this.measurement.ops++;
    this.measurement.bytes += packet.length;
    if (sentAt !== undefined) this.#latencies.record(guest.clock.now() - sentAt);
  }

  #send(): boolean {
    const { memory, clock } = this.#options.guest;
    let sent = false;
    while (this.#awaited.size < IN_FLIGHT_MAX + this.#lost && this.transmitter.pending < IN_FLIGHT_MAX) {
      const place = this.#place(this.#options.workload.size);
      if (!place) break;
      const sequence = this.#sent++;
      const packet = new Uint8Array(this.#options.workload.size);
      fillPacket(packet, sequence, this.#options.sender);
      let done = 0;
      for (const { gpa, length } of place.buffers) {
        memory.write(gpa, packet.subarray(done, done + length));
        done += length;
      }
      this.#awaited.set(sequence, clock.now());
      this.transmitter.send({
        buffers: place.buffers,
        done: (went) => {
          this.#heads.give(place.head);
          this.#cache.give(place.frames);
          // What was never sent because the device is stopped is nobody's error.
          if (went || this.#phase === "stopping") return;
          this.#awaited.delete(sequence);
          this.measurement.errors++;
        },
      });
      sent = true;
    }
    return sent;
  }

  /** A head and up to three fragments, anywhere in their frames. */
  #place(size: number) {
    const head = this.#heads.take();
    if (head === undefined) return undefined;
    const headLength = Math.min(size, PACKET_LENGTH_MIN + this.#next(HEAD_BYTES - PACKET_LENGTH_MIN));
    const buffers: DmaBuffer[] = [{ gpa: head, length: headLength }];
    const rest = size - headLength;
    const count = Math.max(Math.ceil(rest / FRAME_SIZE), Math.min(rest, 1 + this.#next(FRAGMENTS_MAX)));
    const frames = this.#cache.take(count);
    if (!frames) {
      this.#heads.give(head);
      return undefined;
    }
    frames.forEach((frame, i) => {
      const length = Math.floor((rest * (i + 1)) / count) - Math.floor((rest * i) / count);
      buffers.push({ gpa: (frame + this.#next(FRAME_SIZE - length + 1)) as Gpa, length });
    });
    return { head, frames, buffers };
  }
}

/** Heads of packets: pieces of frames, as from a slab. */
class Heads {
  readonly #cache: FrameCache;
  readonly #frames: Gpa[] = [];
  readonly #free: Gpa[] = [];

  constructor(cache: FrameCache) {
    this.#cache = cache;
  }

  take(): Gpa | undefined {
    if (this.#free.length === 0) {
      const frame = this.#cache.take(1)?.[0];
      if (frame === undefined) return undefined;
      this.#frames.push(frame);
      for (let at = 0; at < FRAME_SIZE; at += HEAD_BYTES) this.#free.push((frame + at) as Gpa);
    }
    return this.#free.pop();
  }

  give(head: Gpa): void {
    this.#free.push(head);
  }

  close(): void {
    this.#cache.give(this.#frames);
    this.#frames.length = this.#free.length = 0;
  }
}
