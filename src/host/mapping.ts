import fs from "node:fs";
import { HostError, ProtocolError } from "../base/errors.ts";
import type { GuestRegion } from "../memory/guest-memory.ts";
import { closeFd, lastErrno, libc, MAP_FAILED, systemCall, viewOf } from "./libc.ts";
import type { PresentMappings } from "./present-mappings.ts";

const PROT_READ_WRITE = 3;
const MAP_SHARED = 1;
const MAP_ANONYMOUS = 0x20;
const MFD_CLOEXEC = 1;

interface MappedFile {
  readonly address: bigint;
  readonly size: number;
  readonly buffer: ArrayBuffer;
  readonly presentAddress: number | undefined;
}

/**
 * Maps files that a peer sent, each as a whole and once, however often the peer sends a duplicate of its fd.
 *
 * A peer that shrinks a mapped file kills this process (SIGBUS). QEMU's memory-backend-memfd is sealed against that.
 */
export class FdMapper {
  readonly #files = new Map<string, MappedFile>();
  readonly #present: PresentMappings | undefined;

  /** Maps each file a second time with `present`, which stays its owner's. */
  constructor(present?: PresentMappings) {
    this.#present = present;
  }

  /**
   * Map `size` bytes at `offset` of the file and take over its fd, which is closed in any case. Throws ProtocolError
   * for a range that is not in the file, HostError when the host cannot map it.
   */
  map(fd: number, offset: number, size: number): Omit<GuestRegion, "gpa" | "size"> {
    try {
      const stat = fs.fstatSync(fd, { bigint: true });
      // A mapping keeps the inode, so that its number is not given to another file while it is a key here.
      const key = `${stat.dev}:${stat.ino}`;
      const length = Number(stat.size);
      if (!(offset >= 0 && size > 0 && offset + size <= (this.#files.get(key)?.size ?? length)))
        throw new ProtocolError(`bytes ${offset}+${size} of a shared file of ${length} bytes`);
      let file = this.#files.get(key);
      if (!file) {
        file = mapWhole(fd, length, this.#present);
        this.#files.set(key, file);
      }
      return {
        hostAddress: Number(file.address) + offset,
        bytes: new Uint8Array(file.buffer, offset, size),
        presentAddress: file.presentAddress === undefined ? undefined : file.presentAddress + offset,
      };
    } finally {
      closeFd(fd);
    }
  }

  /** Unmap all. Every view made by map() has length 0 from now on: late use fails, it does not crash. */
  close(): void {
    for (const { address, size, buffer } of this.#files.values()) {
      buffer.transfer(0);
      // SAFETY: the range is one that mmap returned; its only ArrayBuffer was detached just now.
      systemCall("munmap", () => libc.munmap(address, size));
    }
    this.#files.clear();
  }
}

/** Memory of this process that all its threads see at the same address; zero, and committed as it is touched. */
export class SharedMapping {
  readonly address: number;
  readonly size: number;

  /** Throws HostError. */
  constructor(size: number) {
    this.address = Number(map(-1, size, MAP_SHARED | MAP_ANONYMOUS));
    this.size = size;
  }

  /** A view of such a mapping, in any thread. */
  static bytes({ address, size }: { readonly address: number; readonly size: number }): Uint8Array {
    return new Uint8Array(viewOf(BigInt(address), size));
  }

  /** No thread has a view any more. */
  close(): void {
    unmap(this.address, this.size);
  }
}

function mapWhole(fd: number, size: number, present: PresentMappings | undefined): MappedFile {
  const address = map(fd, size, MAP_SHARED);
  const presentAddress = present?.of(Number(address), size);
  return { address, size, buffer: viewOf(address, size), presentAddress };
}

/** `size` bytes of a file from `offset` on, for reading and writing, as others see them. Throws HostError. */
export const mapShared = (fd: number, size: number, offset: number): number =>
  Number(map(fd, size, MAP_SHARED, offset));

function map(fd: number, size: number, flags: number, offset = 0): bigint {
  // SAFETY: the kernel chooses the place.
  const address = libc.mmap(null, size, PROT_READ_WRITE, flags, fd, offset);
  if (address === MAP_FAILED) throw new HostError("mmap", lastErrno(), `${size} bytes`);
  return address;
}

/** The caller says that nobody uses the range any more. */
export function unmap(address: number, size: number): void {
  // SAFETY: the range is one that mmap returned.
  systemCall("munmap", () => libc.munmap(BigInt(address), size));
}

/** An unnamed file in memory, as QEMU's memory-backend-memfd makes them. The caller closes it. */
export function createMemfd(name: string, size: number): number {
  // SAFETY: koffi passes a NUL-terminated copy of the name.
  const fd = systemCall("memfd_create", () => libc.memfdCreate(name, MFD_CLOEXEC));
  fs.ftruncateSync(fd, size);
  return fd;
}
