/**
 * Random map, unmap, DMA and unpin steps, in the proof machine: `node test/vfio/fuzz.js BDF SEED STEPS [TWIN]`.
 *
 * What the IOMMU maps is known twice: from the calls that the container got (MappedFrames), and for what the guest has
 * mapped from the guest itself. DMA must reach what is mapped and nothing else: memory and disk are compared with their
 * shadows at each DMA. Prints what was wrong, and each DMA that the IOMMU must have blocked, for a comparison with QEMU's
 * trace.
 */
import { type Random, random } from "../../src/base/random.ts";
import { FRAME_SIZE, type Gpa } from "../../src/base/units.ts";
import {
  type DmaBuffer,
  type DmaDirection,
  DmaMapFailed,
  type DmaSegment,
} from "../../src/driver/dma-api.ts";
import { VIRTIO_IOMMU_S_NOMEM } from "../../src/wire/virtio-iommu.ts";
import { BLOCK, DISK_BLOCKS, type Piece, Shadow } from "./shadow.ts";
import { twins } from "./twins.ts";
import { DATA_FRAMES, dataFrame, World } from "./world.ts";

/** A command of which the IOMMU must have blocked these pieces. */
export interface Blocked {
  /** The function was to write memory. */
  readonly write: boolean;
  readonly pieces: readonly Piece[];
}

export interface FuzzReport {
  readonly steps: Record<string, number>;
  /** Kinds of mistakes, and how many of each. */
  readonly mistakes: Record<string, number>;
  /** The first of them, in words. */
  readonly first: readonly string[];
  readonly blocked: readonly Blocked[];
  /** Pieces that went through where the guest had mapped nothing: not unpinned yet, or kept for their block's sake. */
  readonly spare: number;
  /** Mappings that the host had no room for. */
  readonly refused: number;
  readonly maps: number;
  readonly unmaps: number;
}

interface Live {
  readonly buffers: readonly DmaBuffer[];
  readonly segments: readonly DmaSegment[];
  readonly direction: DmaDirection;
}

const LIVE_MAX = 48;
/** Two pages, which need no list. */
const WINDOW_BLOCKS = 16;
const NEIGHBOURHOODS = 12;
const FIRST_MISTAKES = 5;
/** Steps, and how many of so many are each. */
const WEIGHTS = { map: 12, unmap: 11, mapped: 6, raw: 8, request: 3, pass: 1 } as const;
type Step = keyof typeof WEIGHTS;
const CHOICES = (Object.keys(WEIGHTS) as Step[]).flatMap((step) => Array<Step>(WEIGHTS[step]).fill(step));
const DIRECTIONS: readonly DmaDirection[] = ["to-device", "from-device", "bidirectional"];

class Fuzz {
  readonly #world: World;
  readonly #next: Random;
  readonly #shadow: Shadow;
  readonly #live: Live[] = [];
  /** How often the guest has mapped each frame. */
  readonly #counts = new Map<number, number>();
  /** Always mapped: what is on the disk is read to there. */
  readonly #window: Gpa;
  readonly #steps: Record<string, number> = {};
  readonly #mistakes: Record<string, number> = {};
  readonly #first: string[] = [];
  readonly #blocked: Blocked[] = [];
  #spare = 0;
  #refused = 0;
  #step = 0;

  constructor(world: World, seed: number) {
    this.#world = world;
    this.#next = random(seed);
    this.#shadow = new Shadow(world, this.#next);
    this.#window = world.dma.allocCoherent(WINDOW_BLOCKS * BLOCK).gpa;
    for (let block = 0; block < DISK_BLOCKS; block += WINDOW_BLOCKS)
      this.#shadow.onDisk(block, WINDOW_BLOCKS * BLOCK).set(this.#readDisk(block, WINDOW_BLOCKS));
    // The others have no memory before somebody maps them.
    for (let i = 0; i < 2 * DATA_FRAMES; i += 2)
      this.#shadow.fill({ address: dataFrame(i) * FRAME_SIZE, length: 64 });
  }

  run(steps: number): FuzzReport {
    for (this.#step = 0; this.#step < steps; this.#step++) {
      const kind = CHOICES[this.#next(CHOICES.length)]!;
      this.#steps[kind] = (this.#steps[kind] ?? 0) + 1;
      this[kind]();
    }
    this.#end();
    const { maps, unmaps } = this.#world.mapped;
    const counted = {
      steps: this.#steps,
      mistakes: this.#mistakes,
      first: this.#first,
      spare: this.#spare,
      refused: this.#refused,
    };
    return { ...counted, blocked: this.#blocked, maps, unmaps };
  }

  map(): void {
    if (this.#live.length === LIVE_MAX) this.unmap();
    const buffers = this.#buffers(1 + this.#next(6));
    const direction = DIRECTIONS[this.#next(3)]!;
    const segments = this.#tryMap(buffers, direction);
    if (!segments) return;
    this.#live.push({ buffers, segments, direction });
    this.#count(buffers, 1);
    for (const { gpa } of buffers)
      if (!this.#world.mapped.has(gfnOf(gpa)))
        this.#wrong("unreachable", `frame ${gfnOf(gpa)} is mapped for the guest`);
  }

  /** Undefined: the host has no room. */
  #tryMap(buffers: readonly DmaBuffer[], direction: DmaDirection): DmaSegment[] | undefined {
    try {
      return this.#world.dma.mapSg(buffers, direction);
    } catch (error) {
      if (!(error instanceof DmaMapFailed) || error.status !== VIRTIO_IOMMU_S_NOMEM) throw error;
      this.#refused++;
      return undefined;
    }
  }

  unmap(): void {
    if (this.#live.length === 0) return;
    const [{ buffers, segments, direction }] = this.#live.splice(this.#next(this.#live.length), 1) as [Live];
    this.#world.dma.unmapSg(segments, direction);
    this.#count(buffers, -1);
  }

  /** DMA to what the guest has mapped. */
  mapped(): void {
    if (this.#live.length === 0) return;
    const { buffers, direction } = this.#live[this.#next(this.#live.length)]!;
    const { gpa } = buffers[this.#next(buffers.length)]!;
    const kind = direction === "to-device" ? "write" : direction === "from-device" ? "read" : this.#kind();
    this.#dma(kind, [{ address: gpa + this.#offset(), length: BLOCK }]);
  }

  /** DMA to any frames, mapped or not. */
  raw(): void {
    const [first, second] = [this.#frame() * FRAME_SIZE, this.#frame() * FRAME_SIZE];
    const straddles = first !== second && this.#next(4) === 0;
    const addresses = straddles ? [first + FRAME_SIZE - BLOCK, second] : [first + this.#offset()];
    const pieces = addresses.map((address) => ({ address, length: BLOCK }));
    this.#dma(this.#kind(), pieces);
  }

  /** As a driver: map, DMA, unmap. */
  request(): void {
    const buffers = this.#buffers(1 + this.#next(4));
    const length = buffers.length * FRAME_SIZE;
    const block = this.#next(DISK_BLOCKS - length / BLOCK);
    const kind = this.#kind();
    const pieces = buffers.map(({ gpa }) => ({ address: gpa, length: FRAME_SIZE }));
    if (kind === "write") for (const piece of pieces) this.#shadow.fill({ ...piece, length: 64 });
    // A driver would wait for room: so there is some.
    const segments = this.#tryMap(buffers, "bidirectional");
    if (!segments) return;
    this.#world.dma.unmapSg(segments, "bidirectional");
    const status = this.#world.request({ kind, block, buffers });
    if (status !== 0) this.#wrong("status", `${status.toString(16)} for a request`);
    this.#moved(kind, pieces, block);
    this.#check(pieces);
  }

  pass(): void {
    this.#world.pass();
    for (const gfn of this.#counts.keys())
      if (!this.#world.mapped.has(gfn)) this.#wrong("unreachable", `frame ${gfn} was unmapped by a pass`);
    const counted = this.#world.pinner.kernelPinnedPages();
    if (counted !== this.#world.mapped.size)
      this.#wrong("kernel", `${counted} pages are locked, and ${this.#world.mapped.size} were mapped`);
  }

  #dma(kind: "read" | "write", pieces: readonly Piece[]): void {
    const block = this.#next(DISK_BLOCKS - pieces.length);
    if (kind === "write") for (const piece of pieces) this.#shadow.fill({ ...piece, length: 64 });
    const [first, second] = pieces as [Piece, Piece?];
    const status = this.#world.dmaTo(kind, block, pieces.length, first.address, second?.address);
    const reached = new Set(pieces.filter((piece) => this.#reaches(piece)));
    const blocked = pieces.filter((piece) => !reached.has(piece));
    if (blocked.length > 0) this.#blocked.push({ write: kind === "read", pieces: blocked });
    else if (status !== 0) this.#wrong("status", `${status.toString(16)} for DMA to mapped memory`);
    pieces.forEach((piece, i) => {
      if (reached.has(piece)) this.#moved(kind, [piece], block + i);
      else if (kind === "write") this.#leaked(piece, block + i);
    });
    this.#check(pieces);
  }

  /** Whether DMA to a piece must go through. */
  #reaches({ address }: Piece): boolean {
    const gfn = gfnOf(address);
    if (this.#counts.has(gfn)) return true;
    const spare = this.#world.mapped.has(gfn);
    if (spare) this.#spare++;
    return spare;
  }

  /** In the shadows: what a transfer has moved. */
  #moved(kind: "read" | "write", pieces: readonly Piece[], block: number): void {
    let at = block;
    for (const piece of pieces) {
      const memory = this.#shadow.bytes(piece);
      const disk = this.#shadow.onDisk(at, piece.length);
      if (kind === "read") memory.set(disk);
      else {
        disk.set(memory);
        if (piece.length === BLOCK) this.#compareDisk(at);
      }
      at += piece.length / BLOCK;
    }
  }

  /** A blocked read of memory: whatever the disk has now, it is not what was in memory. */
  #leaked(piece: Piece, block: number): void {
    const found = this.#readDisk(block, 1);
    const secret = this.#shadow.bytes(piece);
    if (Buffer.compare(found, secret) === 0)
      this.#wrong("memory", `a write carried out ${where(piece)}, which is not mapped`);
    this.#shadow.onDisk(block, BLOCK).set(found);
  }

  #compareDisk(block: number, blocks = 1): void {
    const expected = this.#shadow.onDisk(block, blocks * BLOCK);
    const found = this.#readDisk(block, blocks);
    if (Buffer.compare(found, expected) !== 0)
      this.#wrong("memory", `${blocks} blocks from ${block} on are not what memory had`);
    expected.set(found);
  }

  #readDisk(block: number, blocks: number): Uint8Array {
    this.#world.dmaTo("read", block, blocks, this.#window, this.#window + FRAME_SIZE);
    return this.#shadow.found({ address: this.#window, length: blocks * BLOCK });
  }

  #check(pieces: readonly Piece[]): void {
    for (const piece of pieces)
      if (!this.#shadow.agrees(piece)) this.#wrong("memory", `${where(piece)} does not hold what it must`);
  }

  #end(): void {
    while (this.#live.length > 0) this.unmap();
    for (let i = 0; i < 4; i++) this.pass();
    for (const gfn of this.#shadow.wrongFrames()) this.#wrong("memory", `frame ${gfn} at the end`);
    for (let block = 0; block < DISK_BLOCKS; block += WINDOW_BLOCKS) this.#compareDisk(block, WINDOW_BLOCKS);
  }

  #wrong(kind: string, what: string): void {
    this.#mistakes[kind] = (this.#mistakes[kind] ?? 0) + 1;
    if (this.#first.length < FIRST_MISTAKES) this.#first.push(`step ${this.#step}: ${kind}: ${what}`);
  }

  #count(buffers: readonly DmaBuffer[], by: number): void {
    for (const { gpa } of buffers) {
      const count = (this.#counts.get(gfnOf(gpa)) ?? 0) + by;
      if (count === 0) this.#counts.delete(gfnOf(gpa));
      else this.#counts.set(gfnOf(gpa), count);
    }
  }

  /** Whole frames, each once: scattered ones, or neighbours. */
  #buffers(count: number): DmaBuffer[] {
    const first = this.#frameIndex();
    const indexes =
      this.#next(2) === 0
        ? Array.from({ length: count }, (_, i) => (first + i) % (2 * DATA_FRAMES))
        : this.#scattered(count);
    return indexes.map((index) => ({ gpa: (dataFrame(index) * FRAME_SIZE) as Gpa, length: FRAME_SIZE }));
  }

  #scattered(count: number): number[] {
    const indexes = new Set<number>();
    while (indexes.size < count) indexes.add(this.#frameIndex());
    return [...indexes];
  }

  #frame(): number {
    return dataFrame(this.#frameIndex());
  }

  /** Most are in a few neighbourhoods, so that frames come again, and blocks fill. */
  #frameIndex(): number {
    if (this.#next(8) === 0) return this.#next(2 * DATA_FRAMES);
    return ((this.#next(NEIGHBOURHOODS) * 2 * DATA_FRAMES) / NEIGHBOURHOODS + this.#next(48)) | 0;
  }

  #kind(): "read" | "write" {
    return this.#next(2) === 0 ? "read" : "write";
  }

  /** Of a block within a frame. */
  #offset(): number {
    return 4 * this.#next((FRAME_SIZE - BLOCK) / 4 + 1);
  }
}

const gfnOf = (address: number): number => Math.floor(address / FRAME_SIZE);
const where = ({ address, length }: Piece): string => `${length} bytes at 0x${address.toString(16)}`;

const [bdf, seed, steps, twin] = process.argv.slice(2);
const world = new World({ bdf: bdf!, ...(twin && twins[twin]!()) });
console.log(JSON.stringify(new Fuzz(world, Number(seed)).run(Number(steps))));
world.close();
