import type { Gpa, Iova } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import type { DmaApi } from "./dma-api.ts";

export interface RingOptions {
  readonly memory: GuestMemory;
  readonly dma: DmaApi;
  /** Entries; one less is the device's at most. */
  readonly size: number;
}

/** A ring of entries that the driver gives in order, and takes back when the device has written their status. */
export class DescriptorRing {
  readonly iova: Iova;
  readonly size: number;
  readonly #memory: GuestMemory;
  readonly #dma: DmaApi;
  readonly #gpa: Gpa;
  readonly #entrySize: number;
  readonly #statusAt: number;
  #tail = 0;
  #head = 0;

  /** `statusAt`: where in an entry its status is, two bytes. Throws DmaMapFailed. */
  constructor({ memory, dma, size }: RingOptions, entrySize: number, statusAt: number) {
    const { gpa, iova } = dma.allocCoherent(size * entrySize);
    this.#memory = memory;
    this.#dma = dma;
    this.#gpa = gpa;
    this.#entrySize = entrySize;
    this.#statusAt = statusAt;
    this.iova = iova;
    this.size = size;
  }

  /** The next entry to give: what the device is told. */
  get tail(): number {
    return this.#tail;
  }
  get room(): number {
    return this.size - 1 - ((this.#tail - this.#head + this.size) % this.size);
  }

  give(entry: Uint8Array): void {
    this.#memory.write(this.#gpa + this.#tail * this.#entrySize, entry);
    this.#tail = (this.#tail + 1) % this.size;
  }

  /** Status of the entry `ahead` of the next one to take. */
  status(ahead = 0): number {
    const index = (this.#head + ahead) % this.size;
    // ORDERING: acquire; what the device wrote before the status is read after it.
    return this.#memory.load16(this.#gpa + index * this.#entrySize + this.#statusAt);
  }

  take(): Uint8Array {
    const entry = new Uint8Array(this.#entrySize);
    this.#memory.read(this.#gpa + this.#head * this.#entrySize, entry);
    this.#head = (this.#head + 1) % this.size;
    return entry;
  }

  close(): void {
    this.#dma.freeCoherent(this.#gpa, this.iova, this.size * this.#entrySize);
  }
}
