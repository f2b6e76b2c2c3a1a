import { DmaFault, NotGuestRam } from "../base/errors.ts";
import { FRAME_SIZE, type Iova } from "../base/units.ts";
import type { GuestAccess } from "../memory/guest-memory.ts";
import {
  GPU_BUS_ERROR,
  GPU_COPY,
  GPU_DONE,
  GPU_INVALID,
  GPU_LENGTH_MAX,
  GPU_NO_PAGE,
  GPU_OK,
  GPU_PAGE_VALID,
  GpuCommand,
  GpuPage,
} from "../wire/gpu.ts";
import type { DeviceCounters } from "./counters.ts";

export interface GpuSetup {
  readonly ring: { readonly iova: Iova; readonly size: number };
  /** The table of pages, and how many entries it has. */
  readonly table: Iova;
  readonly pages: number;
}

type Command = ReturnType<typeof GpuCommand.read>;

/**
 * A graphics device's copy engine. It executes the commands of its ring in order; each reads all of its source before
 * it writes. A ring that the IOMMU forbids loses nothing: a command that was executed is not executed again.
 */
export class Gpu {
  readonly #memory: GuestAccess;
  readonly #counters: DeviceCounters;
  #setup: GpuSetup | undefined;
  #head = 0;
  #tail = 0;
  /** Error of the command at the head, when it was executed and not answered yet. */
  #executed: number | undefined;

  constructor(memory: GuestAccess, counters: DeviceCounters) {
    this.#memory = memory;
    this.#counters = counters;
  }

  start(setup: GpuSetup): void {
    this.#setup = setup;
    this.#head = this.#tail = 0;
    this.#executed = undefined;
  }

  /** The tail register: the index behind the last command. */
  submit(tail: number): void {
    if (this.#setup && tail >= 0 && tail < this.#setup.ring.size) this.#tail = tail;
    else this.#counters.errors++;
  }

  /** Execute at most `limit` commands. `more`: the limit was reached. */
  run(limit: number): { completed: number; more: boolean } {
    let completed = 0;
    try {
      while (completed < limit && this.#step()) completed++;
    } catch (error) {
      if (error instanceof DmaFault) this.#counters.faults++;
      else if (error instanceof NotGuestRam) {
        this.#counters.errors++;
        this.#setup = undefined; // a ring that is not RAM
      } else throw error;
    }
    return { completed, more: completed === limit };
  }

  #step(): boolean {
    const setup = this.#setup;
    if (!setup || this.#head === this.#tail) return false;
    const at = setup.ring.iova + this.#head * GpuCommand.size;
    if (this.#executed === undefined) {
      const raw = new Uint8Array(GpuCommand.size);
      this.#memory.read(at, raw);
      this.#executed = this.#attempt(setup, GpuCommand.read(raw));
    }
    // ORDERING: release, after the data. PAIRS WITH the driver's load16 of the status.
    this.#memory.store16(at + GpuCommand.fields.status.at, GPU_DONE | (this.#executed << 8));
    this.#executed = undefined;
    this.#head = (this.#head + 1) % setup.ring.size;
    this.#counters.requests++;
    return true;
  }

  #attempt(setup: GpuSetup, command: Command): number {
    try {
      const error = this.#copy(setup, command);
      if (error !== GPU_OK) this.#counters.errors++;
      return error;
    } catch (error) {
      if (error instanceof DmaFault) this.#counters.faults++;
      else if (error instanceof NotGuestRam) this.#counters.errors++;
      else throw error;
      return GPU_BUS_ERROR;
    }
  }

  #copy({ table, pages }: GpuSetup, { opcode, length, source, target }: Command): number {
    const end = pages * FRAME_SIZE;
    if (opcode !== GPU_COPY || length === 0 || length > GPU_LENGTH_MAX) return GPU_INVALID;
    if (source + length > end || target + length > end) return GPU_INVALID;
    const from = this.#translate(table, source, length);
    const to = this.#translate(table, target, length);
    if (!from || !to) return GPU_NO_PAGE;
    const data = new Uint8Array(length);
    this.#each(from, data, (address, piece) => this.#memory.read(address, piece));
    this.#each(to, data, (address, piece) => this.#memory.write(address, piece));
    return GPU_OK;
  }

  /** The address of the first byte in each page of a range, or undefined where a page is not valid. */
  #translate(table: number, address: number, length: number): number[] | undefined {
    const first = Math.floor(address / FRAME_SIZE);
    const last = Math.floor((address + length - 1) / FRAME_SIZE);
    const raw = new Uint8Array((last - first + 1) * GpuPage.size);
    this.#memory.read(table + first * GpuPage.size, raw);
    const addresses: number[] = [];
    for (let at = 0; at < raw.length; at += GpuPage.size) {
      const { entry } = GpuPage.read(raw, at);
      if (entry % FRAME_SIZE !== GPU_PAGE_VALID) return undefined;
      addresses.push(entry - GPU_PAGE_VALID + (at === 0 ? address % FRAME_SIZE : 0));
    }
    return addresses;
  }

  #each(addresses: readonly number[], data: Uint8Array, move: (address: number, piece: Uint8Array) => void) {
    let done = 0;
    for (const address of addresses) {
      const piece = data.subarray(done, done + FRAME_SIZE - (address % FRAME_SIZE));
      move(address, piece);
      done += piece.length;
      this.#counters.transfers++;
      this.#counters.bytes += piece.length;
    }
  }
}
