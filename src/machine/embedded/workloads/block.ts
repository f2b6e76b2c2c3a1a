import { invariant } from "../../../base/errors.ts";
import { type Random, random } from "../../../base/random.ts";
import { FRAME_SIZE, type Gpa } from "../../../base/units.ts";
import type { DmaBuffer } from "../../../driver/dma-api.ts";
import { FrameCache } from "../../../driver/frames.ts";
import { NvmeQueue } from "../../../driver/nvme.ts";
import type { NvmeIdentity } from "../../../driver/nvme-controller.ts";
import type { NvmePort } from "../../../driver/nvme-rings.ts";
import { isStamped, Stamp, stamp } from "../../../wire/stamp.ts";
import { type FioWorkload, WRITTEN_REGION, writes } from "../../workload-text.ts";
import { Latencies } from "./latencies.ts";
import { type Guest, type GuestWorkload, type Measurement, measurement } from "./workload.ts";

export interface BlockOptions {
  readonly guest: Guest;
  readonly port: NvmePort;
  /** The queue pair; each vCPU has its own. */
  readonly queue: number;
  readonly workload: FioWorkload;
  /** The part of the disk that is this workload's: whole sectors, in bytes. */
  readonly region: { readonly start: number; readonly size: number };
  /** Frames of the page cache; at least those of one request. */
  readonly cacheFrames: number;
  /** Nothing is written: the region is read first instead of filled, and must not change. */
  readonly readOnly?: boolean;
  /** What the disk is; one without these limits if it is not given. */
  readonly disk?: Pick<NvmeIdentity, "blockSize" | "transferMax" | "queueSizeMax"> | undefined;
}

type Phase = "fill" | "measured" | "check" | "finished";

const SECTOR = 512;
/** Filling and checking use large requests, to be quick. */
const BULK_BYTES = 2 ** 18;
const BULK_DEPTH = 8;
/** Blocks tried for a request before the next poll(): those in flight may not be touched. */
const TRIES = 8;
interface Piece {
  readonly first: number;
  readonly blocks: number;
  readonly write: boolean;
}

/**
 * What fio does, on an NVMe queue pair: fill the region, measure, check all of it. Each block carries its place and
 * generation, and every block that is read, in whichever phase, is compared with what was written last; if nothing is
 * written, with what was read first. The queue is its owner's to close, when this has finished.
 */
export class BlockWorkload implements GuestWorkload {
  readonly queue: NvmeQueue;
  readonly measurement: Measurement;
  readonly #options: BlockOptions;
  readonly #next: Random;
  readonly #cache: FrameCache;
  readonly #latencies = new Latencies();
  readonly #blocks: number;
  /**
   * Of each block: what was written last; 0 or negative when that failed, and nobody knows what is there. If nothing is
   * written: the digest of what was read first.
   */
  readonly #generations: Int32Array;
  readonly #bulkBytes: number;
  /** Of each block: readers in flight, or -1 for a writer. */
  readonly #users: Int16Array;
  #phase: Phase = "fill";
  /** The next block of what is done in order. */
  #cursor = 0;
  #began = 0;
  #stopped = false;

  /** Throws DmaMapFailed when there are no rings. The controller learns of `queue` before the first poll(). */
  constructor(options: BlockOptions) {
    const { guest, port, queue, workload, region, cacheFrames, disk, readOnly } = options;
    const { memory, dma, pages, seed } = guest;
    this.#options = options;
    this.#next = random(seed);
    const entries = Math.max(workload.ioDepth, BULK_DEPTH) + 1;
    const size = Math.min(entries, disk?.queueSizeMax ?? entries);
    const { blockSize } = disk ?? {};
    this.queue = new NvmeQueue({ memory, dma, port, id: queue, size, ...(blockSize && { blockSize }) });
    this.#bulkBytes = Math.min(BULK_BYTES, disk?.transferMax ?? BULK_BYTES);
    const largest = Math.max(BULK_BYTES, workload.blockSize) / FRAME_SIZE + 1;
    invariant(!(readOnly && writes(workload)), "who may only read does not write");
    invariant(cacheFrames >= largest, `the page cache has ${largest} frames or more`);
    this.#cache = new FrameCache(pages, cacheFrames, this.#next);
    this.#blocks = Math.floor(Math.min(workload.size ?? WRITTEN_REGION, region.size) / workload.blockSize);
    this.#generations = new Int32Array(this.#blocks);
    this.#users = new Int16Array(this.#blocks);
    this.measurement = measurement(this.#latencies);
  }

  get finished(): boolean {
    return this.#phase === "finished";
  }

  stop(): void {
    this.#stopped = true;
  }

  poll(): boolean {
    if (this.finished) return false;
    const completed = this.queue.poll();
    this.measurement.mapFailures = this.queue.mapFailures;
    const submitted = this.#phase === "measured" ? this.#measure() : this.#bulk();
    return completed > 0 || submitted;
  }

  /** Fill or check, in order. */
  #bulk(): boolean {
    const { workload, readOnly = false } = this.#options;
    const each = Math.max(1, Math.floor(this.#bulkBytes / workload.blockSize));
    const write = this.#phase === "fill" && !readOnly;
    let submitted = false;
    const stopped = this.#stopped && this.#phase === "fill";
    while (!stopped && this.#cursor < this.#blocks && this.queue.pending < BULK_DEPTH) {
      const blocks = Math.min(each, this.#blocks - this.#cursor);
      if (!this.#submit({ first: this.#cursor, blocks, write })) break;
      this.#cursor += blocks;
      submitted = true;
    }
    if (this.queue.pending === 0 && (stopped || this.#cursor === this.#blocks)) this.#advance();
    return submitted;
  }

  #measure(): boolean {
    const { guest, workload } = this.#options;
    const elapsed = guest.clock.now() - this.#began;
    const over = this.#stopped || elapsed >= workload.seconds * 1e9;
    let submitted = false;
    while (!over && this.queue.pending < workload.ioDepth) {
      const piece = this.#choose();
      if (!piece || !this.#submit(piece)) break;
      submitted = true;
    }
    if (over && this.queue.pending === 0) {
      this.measurement.nanoseconds = elapsed;
      this.#advance();
    }
    return submitted;
  }

  #advance(): void {
    this.#cursor = 0;
    if (this.#phase === "fill") {
      this.#phase = "measured";
      this.#began = this.#options.guest.clock.now();
    } else if (this.#phase === "measured") this.#phase = "check";
    else {
      this.#phase = "finished";
      this.#cache.close();
    }
  }

  /** A block for the next request, or undefined while all that were tried are in use. */
  #choose(): Piece | undefined {
    const { rw } = this.#options.workload;
    const mixed = rw === "rw" || rw === "randrw";
    const write = mixed ? this.#next(2) === 1 : rw.endsWith("write");
    for (let tries = 0; tries < TRIES; tries++) {
      const first = rw.startsWith("rand") ? this.#next(this.#blocks) : this.#cursor;
      if (this.#users[first] === 0 || (!write && this.#users[first]! > 0)) {
        this.#cursor = (first + 1) % this.#blocks;
        return { first, blocks: 1, write };
      }
    }
    return undefined;
  }

  #submit(piece: Piece): boolean {
    const { guest, workload } = this.#options;
    const { first, blocks, write } = piece;
    const length = blocks * workload.blockSize;
    const place = this.#place(length);
    if (!place) return false;
    const { frames, buffers } = place;
    const data = new Uint8Array(length);
    const generations = Array.from({ length: blocks }, (_, i) =>
      write ? Math.abs(this.#generations[first + i]!) + 1 : this.#generations[first + i]!,
    );
    if (write)
      for (const [i, block] of this.#split(data)) stamp(block, this.#sector(first + i), generations[i]!);
    // What a device that writes nothing leaves there: no stamp has these heads.
    else for (const [, block] of this.#split(data)) block.fill(0xff, 0, Stamp.size);
    copy(buffers, data, (gpa, part) => guest.memory.write(gpa, part));
    for (let i = 0; i < blocks; i++) this.#users[first + i]! += write ? -1 : 1;
    const measured = this.#phase === "measured";
    const began = guest.clock.now();
    this.queue.submit({
      kind: write ? "write" : "read",
      block: this.#sector(first),
      buffers,
      done: (status) => {
        if (status !== 0) this.measurement.errors++;
        else if (measured) this.#count(length, guest.clock.now() - began);
        if (status === 0 && !write) {
          copy(buffers, data, (gpa, part) => guest.memory.read(gpa, part));
          this.#compare(first, data, generations);
        }
        this.#cache.give(frames);
        for (const [i, generation] of generations.entries()) {
          this.#users[first + i]! -= write ? -1 : 1;
          if (write) this.#generations[first + i] = status === 0 ? generation : -generation;
        }
      },
    });
    return true;
  }

  /** Of the whole disk: workloads beside this one must not have the same blocks. */
  #sector(block: number): number {
    return (this.#options.region.start + block * this.#options.workload.blockSize) / SECTOR;
  }

  #count(bytes: number, ns: number): void {
    this.measurement.ops++;
    this.measurement.bytes += bytes;
    this.#latencies.record(ns);
  }

  #compare(first: number, data: Uint8Array, generations: readonly number[]): void {
    for (const [i, block] of this.#split(data)) {
      if (this.#options.readOnly) {
        this.#compareWithFirst(first + i, digest(block));
        continue;
      }
      if (generations[i]! <= 0) continue;
      this.measurement.compared++;
      if (!isStamped(block, this.#sector(first + i), generations[i]!)) this.measurement.mismatches++;
    }
  }

  #compareWithFirst(block: number, found: number): void {
    const before = this.#generations[block]!;
    if (before === 0) this.#generations[block] = found;
    else {
      this.measurement.compared++;
      if (found !== before) this.measurement.mismatches++;
    }
  }

  *#split(data: Uint8Array): Generator<[number, Uint8Array]> {
    const { blockSize } = this.#options.workload;
    for (let i = 0; i * blockSize < data.length; i++)
      yield [i, data.subarray(i * blockSize, (i + 1) * blockSize)];
  }

  /** Frames of the page cache; small blocks, and one large one of four, begin within a frame. */
  #place(
    length: number,
  ): { readonly frames: readonly Gpa[]; readonly buffers: readonly DmaBuffer[] } | undefined {
    const room = length < FRAME_SIZE ? (FRAME_SIZE - length) / SECTOR + 1 : FRAME_SIZE / SECTOR;
    const offset = length < FRAME_SIZE || this.#next(4) === 0 ? SECTOR * this.#next(room) : 0;
    const frames = this.#cache.take(Math.ceil((offset + length) / FRAME_SIZE));
    if (!frames) return undefined;
    const buffers = frames.map((frame, i): DmaBuffer => {
      const start = i === 0 ? offset : 0;
      const before = i === 0 ? 0 : i * FRAME_SIZE - offset;
      return { gpa: (frame + start) as Gpa, length: Math.min(FRAME_SIZE - start, length - before) };
    });
    return { frames, buffers };
  }
}

/** FNV-1a over 32-bit words, never 0. */
function digest(block: Uint8Array): number {
  const words = new Uint32Array(block.buffer, block.byteOffset, block.length / 4);
  let hash = 0x811c_9dc5;
  for (const word of words) hash = Math.imul(hash ^ word, 0x0100_0193);
  return hash | 1;
}

function copy(
  buffers: readonly DmaBuffer[],
  data: Uint8Array,
  move: (gpa: Gpa, part: Uint8Array) => void,
): void {
  let done = 0;
  for (const { gpa, length } of buffers) {
    move(gpa, data.subarray(done, done + length));
    done += length;
  }
}
