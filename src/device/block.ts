import { DmaFault, type Errno, HostError, NotGuestRam } from "../base/errors.ts";
import type { DmaAccess, GuestAccess } from "../memory/guest-memory.ts";
import { type Chain, lengthOf } from "../virtio/queue.ts";
import {
  SECTOR_SIZE,
  VIRTIO_BLK_F_BLK_SIZE,
  VIRTIO_BLK_F_FLUSH,
  VIRTIO_BLK_F_SEG_MAX,
  VIRTIO_BLK_ID_BYTES,
  VIRTIO_BLK_S_IOERR,
  VIRTIO_BLK_S_OK,
  VIRTIO_BLK_S_UNSUPP,
  VIRTIO_BLK_T_FLUSH,
  VIRTIO_BLK_T_GET_ID,
  VIRTIO_BLK_T_IN,
  VIRTIO_BLK_T_OUT,
  VirtioBlkConfig,
  VirtioBlkReqHead,
} from "../wire/virtio-blk.ts";
import type { BlockStore } from "./block-store.ts";
import { gather, slice } from "./buffers.ts";
import type { DeviceCounters } from "./counters.ts";

/** Entries of the smallest queue that QEMU gives us, less the two that hold a request's head and status. */
const SEG_MAX = 128 - 2;
/**
 * Bytes that move in one DMA window. A driver's buffers are as long as it likes (no SIZE_MAX is offered), and while a
 * window is open nothing is unpinned and no UNMAP succeeds.
 */
export const WINDOW_SIZE_MAX = 2 ** 18;
const bit = (n: number) => 1n << BigInt(n);

/**
 * virtio-blk without a transport. VIRTIO 1.2 section 5.2. Data goes straight between the store and the guest's
 * frames, inside DMA windows in which the IOMMU allowed them.
 */
export class BlockDevice {
  readonly features = bit(VIRTIO_BLK_F_SEG_MAX) | bit(VIRTIO_BLK_F_BLK_SIZE) | bit(VIRTIO_BLK_F_FLUSH);
  readonly queues = 1;
  readonly config: Uint8Array;
  /** How often the host refused, by reason; the guest sees IOERR. */
  readonly hostErrors = new Map<Errno, number>();
  readonly #memory: GuestAccess;
  readonly #store: BlockStore;
  readonly #counters: DeviceCounters;
  readonly #serial: Uint8Array;
  readonly #head = new Uint8Array(VirtioBlkReqHead.size);

  constructor(memory: GuestAccess, store: BlockStore, counters: DeviceCounters, serial = "coiommu") {
    this.#memory = memory;
    this.#store = store;
    this.#counters = counters;
    this.#serial = Buffer.alloc(VIRTIO_BLK_ID_BYTES);
    Buffer.from(serial).copy(this.#serial);
    this.config = VirtioBlkConfig.encode({
      capacity: store.sectors,
      segMax: SEG_MAX,
      blkSize: SECTOR_SIZE,
    });
  }

  /**
   * Serve one request; returns the bytes written to the guest from the first writable one on. Throws DmaFault when
   * the IOMMU forbids the status byte: nobody would learn the outcome, so the request is to be served again.
   */
  handle(chain: Chain): number {
    const writable = lengthOf(chain.writable);
    // Without a writable byte there is no place for a status: the guest's driver is broken.
    if (writable === 0) return this.#malformed();
    const { status, data } = this.#attempt(chain, writable - 1);
    const [place] = slice(chain.writable, writable - 1, 1);
    try {
      this.#memory.write(place!.gpa, Uint8Array.of(status));
    } catch (error) {
      if (error instanceof NotGuestRam) return this.#malformed();
      throw error;
    }
    this.#counters.requests++;
    // Section 2.7.8.2: only a gapless beginning may be reported as written.
    return data === writable - 1 ? writable : data;
  }

  #malformed(): number {
    this.#counters.errors++;
    return 0;
  }

  /** The request's status and how many bytes of data it wrote to the guest. */
  #attempt(chain: Chain, room: number): { status: number; data: number } {
    try {
      return this.#serve(chain, room);
    } catch (error) {
      if (error instanceof DmaFault) this.#counters.faults++;
      else if (error instanceof NotGuestRam) this.#counters.errors++;
      else if (error instanceof HostError) {
        this.#counters.errors++;
        this.hostErrors.set(error.errno, (this.hostErrors.get(error.errno) ?? 0) + 1);
      } else throw error;
      return { status: VIRTIO_BLK_S_IOERR, data: 0 };
    }
  }

  #serve(chain: Chain, room: number): { status: number; data: number } {
    const readable = lengthOf(chain.readable);
    if (readable < VirtioBlkReqHead.size) return this.#refuse();
    gather(this.#memory, chain.readable, this.#head);
    const { type, sector } = VirtioBlkReqHead.read(this.#head);
    switch (type) {
      case VIRTIO_BLK_T_IN:
        if (!this.#inRange(sector, room)) return this.#refuse();
        this.#move(slice(chain.writable, 0, room), sector, "write");
        return { status: VIRTIO_BLK_S_OK, data: room };
      case VIRTIO_BLK_T_OUT: {
        const length = readable - VirtioBlkReqHead.size;
        if (!this.#inRange(sector, length)) return this.#refuse();
        this.#move(slice(chain.readable, VirtioBlkReqHead.size, length), sector, "read");
        return { status: VIRTIO_BLK_S_OK, data: 0 };
      }
      case VIRTIO_BLK_T_FLUSH:
        this.#store.flush();
        return { status: VIRTIO_BLK_S_OK, data: 0 };
      case VIRTIO_BLK_T_GET_ID:
        return { status: VIRTIO_BLK_S_OK, data: this.#writeSerial(chain, room) };
      default:
        return { status: VIRTIO_BLK_S_UNSUPP, data: 0 };
    }
  }

  /** A request that breaks the rules. */
  #refuse(): { status: number; data: number } {
    this.#counters.errors++;
    return { status: VIRTIO_BLK_S_IOERR, data: 0 };
  }

  #inRange(sector: number, length: number): boolean {
    return length % SECTOR_SIZE === 0 && sector + length / SECTOR_SIZE <= this.#store.sectors;
  }

  readonly #readStore = (position: number, piece: Uint8Array) => this.#store.read(position, piece);
  readonly #writeStore = (position: number, piece: Uint8Array) => this.#store.write(position, piece);

  #move(buffers: readonly { gpa: number; length: number }[], sector: number, access: DmaAccess): void {
    // What is written to the guest is read from the store.
    const move = access === "write" ? this.#readStore : this.#writeStore;
    let position = sector * SECTOR_SIZE;
    for (const { gpa, length } of buffers) {
      for (let left = length; left > 0; ) {
        const start = position;
        const size = Math.min(left, WINDOW_SIZE_MAX);
        const from = gpa + length - left;
        this.#memory.transfer(from, size, (piece, done) => move(start + done, piece), access);
        position += size;
        left -= size;
      }
      this.#counters.transfers++;
      this.#counters.bytes += length;
    }
  }

  #writeSerial(chain: Chain, room: number): number {
    const length = Math.min(room, VIRTIO_BLK_ID_BYTES);
    let done = 0;
    for (const part of slice(chain.writable, 0, length)) {
      this.#memory.write(part.gpa, this.#serial.subarray(done, done + part.length));
      done += part.length;
    }
    return length;
  }
}
