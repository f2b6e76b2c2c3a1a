import type { Random } from "../../src/base/random.ts";
import { FRAME_SIZE, type Gfn } from "../../src/base/units.ts";
import { DATA_FRAMES, dataFrame, type World } from "./world.ts";

export const BLOCK = 512;
/** Blocks of the disk that are used. */
export const DISK_BLOCKS = 4096;

/** A part of a transfer, within one frame. */
export interface Piece {
  readonly address: number;
  readonly length: number;
}

/** What memory and disk must hold: their contents, kept a second time by what has been done to them. */
export class Shadow {
  readonly #world: World;
  readonly #next: Random;
  readonly #frames = new Map<number, Uint8Array>();
  readonly disk = new Uint8Array(DISK_BLOCKS * BLOCK);

  constructor(world: World, next: Random) {
    this.#world = world;
    this.#next = next;
  }

  /** The CPU writes numbers that nothing else holds. */
  fill({ address, length }: Piece): void {
    const bytes = new Uint8Array(length);
    for (let at = 0; at < length; at++) bytes[at] = this.#next(256);
    this.#world.memory.write(address, bytes);
    this.bytes({ address, length }).set(bytes);
  }

  /** What a piece of memory must hold. */
  bytes({ address, length }: Piece): Uint8Array {
    const gfn = Math.floor(address / FRAME_SIZE);
    const frame = this.#frames.get(gfn) ?? new Uint8Array(FRAME_SIZE);
    this.#frames.set(gfn, frame);
    return frame.subarray(address % FRAME_SIZE, (address % FRAME_SIZE) + length);
  }

  onDisk(block: number, length: number): Uint8Array {
    return this.disk.subarray(block * BLOCK, block * BLOCK + length);
  }

  /** Whether the frame of a piece holds what it must. Takes over what it holds, so that a mistake is found once. */
  agrees({ address }: Piece): boolean {
    const first = address - (address % FRAME_SIZE);
    const found = this.found({ address: first, length: FRAME_SIZE });
    const expected = this.bytes({ address: first, length: FRAME_SIZE });
    const equal = Buffer.compare(found, expected) === 0;
    expected.set(found);
    return equal;
  }

  /** What a piece of memory does hold. */
  found({ address, length }: Piece): Uint8Array {
    const bytes = new Uint8Array(length);
    this.#world.memory.read(address, bytes);
    return bytes;
  }

  /** Data frames that do not hold what they must. */
  wrongFrames(): Gfn[] {
    const all = Array.from({ length: 2 * DATA_FRAMES }, (_, i) => dataFrame(i) as Gfn);
    return all.filter((gfn) => !this.agrees({ address: gfn * FRAME_SIZE, length: FRAME_SIZE }));
  }
}
