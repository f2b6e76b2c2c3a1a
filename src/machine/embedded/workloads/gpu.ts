import { type Random, random } from "../../../base/random.ts";
import { FRAME_SIZE, type Gpa } from "../../../base/units.ts";
import { DmaMapFailed } from "../../../driver/dma-api.ts";
import { FrameCache } from "../../../driver/frames.ts";
import { type GpuBinding, GpuDriver, type GpuPort } from "../../../driver/gpu.ts";
import { GPU_LENGTH_MAX, GPU_OK } from "../../../wire/gpu.ts";
import { isStamped, stamp } from "../../../wire/stamp.ts";
import type { GpuWorkload as GpuWorkloadText } from "../../workload-text.ts";
import { Latencies } from "./latencies.ts";
import { type Guest, type GuestWorkload, type Measurement, measurement } from "./workload.ts";

export interface GpuOptions {
  readonly guest: Guest;
  readonly port: GpuPort;
  readonly workload: GpuWorkloadText;
  /** Commands in the ring. */
  readonly ringSize: number;
}

/** What copies move, and what is compared: each piece has a number of its own when its buffer is filled. */
const PIECE_BYTES = 512;
const PIECES_PER_FRAME = FRAME_SIZE / PIECE_BYTES;
/** Frames that the CPU fills, or compares, in one poll(). */
const CPU_FRAMES = 64;
const UNKNOWN = 0;

/** A buffer's life, over and over: filled by the CPU, mapped, used by the device, unmapped, compared, freed. */
interface Slot {
  state: "empty" | "filling" | "binding" | "live" | "draining" | "comparing";
  readonly index: number;
  frames: readonly Gpa[];
  /** Frames that are done, while it is filled or compared. */
  cursor: number;
  binding: GpuBinding | undefined;
  bornAt: number;
  /** Copies under way that touch it. */
  users: number;
  /** The number of each piece; UNKNOWN after a copy that failed. */
  readonly numbers: Float64Array;
}

/**
 * A program on a graphics device: large buffers of scattered frames that stay mapped for seconds, random copies
 * between them, and new frames for each buffer when its time is over.
 */
export class GpuWorkload implements GuestWorkload {
  readonly driver: GpuDriver;
  readonly measurement: Measurement;
  readonly #options: GpuOptions;
  readonly #next: Random;
  readonly #cache: FrameCache;
  readonly #latencies = new Latencies();
  readonly #slots: readonly Slot[];
  readonly #framesEach: number;
  readonly #began: number;
  #number = UNKNOWN;
  #ending = false;
  #finished = false;

  /** Throws DmaMapFailed when there is no ring or table. The device is started with them before the first poll(). */
  constructor(options: GpuOptions) {
    const { guest, port, workload, ringSize } = options;
    const { memory, dma, pages, clock, seed } = guest;
    this.#options = options;
    this.#next = random(seed);
    this.#framesEach = workload.size / FRAME_SIZE;
    const total = workload.buffers * this.#framesEach;
    this.driver = new GpuDriver({ memory, dma, port, size: ringSize, pages: total });
    // One buffer's more, so that a buffer that is replaced gets other frames.
    this.#cache = new FrameCache(pages, total + this.#framesEach, this.#next);
    this.#slots = Array.from({ length: workload.buffers }, (_, index) => ({
      ...{ state: "empty", index, frames: [], cursor: 0, binding: undefined, bornAt: 0, users: 0 },
      numbers: new Float64Array(this.#framesEach * PIECES_PER_FRAME),
    }));
    this.measurement = measurement(this.#latencies);
    this.#began = clock.now();
  }

  get finished(): boolean {
    return this.#finished;
  }

  stop(): void {
    this.#end(this.#options.guest.clock.now());
  }

  poll(): boolean {
    if (this.#finished) return false;
    const now = this.#options.guest.clock.now();
    if (now - this.#began >= this.#options.workload.seconds * 1e9) this.#end(now);
    let busy = this.driver.poll() > 0;
    for (const slot of this.#slots) busy = this.#turn(slot, now) || busy;
    if (!this.#ending) return this.#submit() || busy;
    if (!this.#slots.every((s) => s.state === "empty")) return busy;
    this.driver.close();
    this.#cache.close();
    this.#finished = true;
    return true;
  }

  #end(now: number): void {
    if (this.#ending) return;
    this.#ending = true;
    this.measurement.nanoseconds = now - this.#began;
  }

  /** One step of a buffer's life; whether there was one to do. */
  #turn(slot: Slot, now: number): boolean {
    switch (slot.state) {
      case "empty":
        return !this.#ending && this.#allocate(slot);
      case "filling":
        this.#each(slot, (gpa, first) => this.#fill(slot, gpa, first));
        if (slot.cursor === slot.frames.length) slot.state = "binding";
        return true;
      case "binding":
        return this.#ending ? this.#free(slot) : this.#bind(slot, now);
      case "live":
        if (!this.#ending && now - slot.bornAt < this.#options.workload.holdMs * 1e6) return false;
        slot.state = "draining";
        return true;
      case "draining":
        if (slot.users > 0) return false;
        this.driver.unbind(slot.binding!);
        slot.binding = undefined;
        slot.cursor = 0;
        slot.state = "comparing";
        return true;
      case "comparing":
        this.#each(slot, (gpa, first) => this.#compare(slot, gpa, first));
        return slot.cursor < slot.frames.length || this.#free(slot);
    }
  }

  #allocate(slot: Slot): boolean {
    const frames = this.#cache.take(this.#framesEach);
    if (!frames) return false;
    slot.frames = frames;
    slot.cursor = 0;
    slot.state = "filling";
    return true;
  }

  #free(slot: Slot): boolean {
    this.#cache.give(slot.frames);
    slot.frames = [];
    slot.state = "empty";
    return true;
  }

  #bind(slot: Slot, now: number): boolean {
    const list = slot.frames.map((gpa) => ({ gpa, length: FRAME_SIZE }));
    try {
      slot.binding = this.driver.bind(slot.index * this.#framesEach, list);
    } catch (error) {
      if (!(error instanceof DmaMapFailed)) throw error;
      this.measurement.mapFailures++;
      return false;
    }
    slot.bornAt = now;
    slot.state = "live";
    return true;
  }

  #each(slot: Slot, visit: (gpa: Gpa, firstPiece: number) => void): void {
    const end = Math.min(slot.frames.length, slot.cursor + CPU_FRAMES);
    for (; slot.cursor < end; slot.cursor++) visit(slot.frames[slot.cursor]!, slot.cursor * PIECES_PER_FRAME);
  }

  #fill(slot: Slot, gpa: Gpa, first: number): void {
    const frame = new Uint8Array(FRAME_SIZE);
    for (let i = 0; i < PIECES_PER_FRAME; i++) {
      slot.numbers[first + i] = ++this.#number;
      stamp(frame.subarray(i * PIECE_BYTES, (i + 1) * PIECE_BYTES), this.#number, this.#options.guest.seed);
    }
    this.#options.guest.memory.write(gpa, frame);
  }

  #compare(slot: Slot, gpa: Gpa, first: number): void {
    const frame = new Uint8Array(FRAME_SIZE);
    this.#options.guest.memory.read(gpa, frame);
    for (let i = 0; i < PIECES_PER_FRAME; i++) {
      const number = slot.numbers[first + i]!;
      if (number === UNKNOWN) continue;
      this.measurement.compared++;
      const piece = frame.subarray(i * PIECE_BYTES, (i + 1) * PIECE_BYTES);
      if (!isStamped(piece, number, this.#options.guest.seed)) this.measurement.mismatches++;
    }
  }

  #submit(): boolean {
    const live = this.#slots.filter((s) => s.state === "live");
    let submitted = false;
    while (live.length > 0 && this.driver.pending < this.#options.workload.ioDepth) {
      const from = live[this.#next(live.length)]!;
      const to = live[this.#next(live.length)]!;
      this.#copy(from, to);
      submitted = true;
    }
    return submitted;
  }

  /** A random part of one buffer to a random place in another, or in the same. */
  #copy(from: Slot, to: Slot): void {
    const pieces = this.#framesEach * PIECES_PER_FRAME;
    const count = 1 + this.#next(Math.min(pieces, GPU_LENGTH_MAX / PIECE_BYTES));
    const source = this.#next(pieces - count + 1);
    const target = this.#next(pieces - count + 1);
    const { clock } = this.#options.guest;
    const began = clock.now();
    const address = (slot: Slot, piece: number) => (slot.index * pieces + piece) * PIECE_BYTES;
    from.users++;
    to.users++;
    this.driver.copy({
      source: address(from, source),
      target: address(to, target),
      length: count * PIECE_BYTES,
      done: (error) => {
        from.users--;
        to.users--;
        // Copies are done in order, so the numbers are those that the device saw.
        if (error === GPU_OK) to.numbers.set(from.numbers.slice(source, source + count), target);
        else to.numbers.fill(UNKNOWN, target, target + count);
        if (error !== GPU_OK) this.measurement.errors++;
        else if (!this.#ending) this.#count(count * PIECE_BYTES, clock.now() - began);
      },
    });
  }

  #count(bytes: number, ns: number): void {
    this.measurement.ops++;
    this.measurement.bytes += bytes;
    this.#latencies.record(ns);
  }
}
