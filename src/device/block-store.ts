import fs from "node:fs";
import { HostError, UserError } from "../base/errors.ts";
import { SECTOR_SIZE } from "../wire/virtio-blk.ts";

/** What a disk's sectors are kept in. The caller keeps positions (bytes) in range. All throw HostError. */
export interface BlockStore {
  readonly sectors: number;
  read(position: number, into: Uint8Array): void;
  write(position: number, from: Uint8Array): void;
  /** What was written before is durable afterwards. */
  flush(): void;
  close(): void;
}

/** A raw image, or memory of `sizeMiB`. */
export interface StoreOptions {
  readonly file?: string;
  readonly sizeMiB: number;
}

/** Throws UserError when the image cannot be used. */
export const openStore = ({ file, sizeMiB }: StoreOptions): BlockStore =>
  file === undefined ? new MemoryStore((sizeMiB * 2 ** 20) / SECTOR_SIZE) : new FileStore(file);

const reasons: Record<string, string> = {
  ENOENT: "does not exist",
  EACCES: "may not be read and written by this user",
  EPERM: "may not be read and written by this user",
  EROFS: "is on a read-only file system",
  EISDIR: "is a directory",
};

/** A raw image file; what is behind its last whole sector is not used. */
export class FileStore implements BlockStore {
  readonly sectors: number;
  readonly #fd: number;

  /** Throws UserError when the image cannot be used. */
  constructor(path: string) {
    try {
      this.#fd = fs.openSync(path, "r+");
    } catch (error) {
      const errno = errnoOf(error);
      throw new UserError(`disk image ${path} ${reasons[errno] ?? `cannot be opened: ${errno}`}`);
    }
    const stat = fs.fstatSync(this.#fd);
    this.sectors = Math.floor(stat.size / SECTOR_SIZE);
    if (stat.isFile() && this.sectors > 0) return;
    fs.closeSync(this.#fd);
    throw new UserError(`disk image ${path} ${stat.isFile() ? "is empty" : "is not a regular file"}`);
  }

  read(position: number, into: Uint8Array): void {
    all("read", into, (done) => fs.readSync(this.#fd, into, done, into.length - done, position + done));
  }

  write(position: number, from: Uint8Array): void {
    all("write", from, (done) => fs.writeSync(this.#fd, from, done, from.length - done, position + done));
  }

  flush(): void {
    all("fdatasync", new Uint8Array(0), () => {
      fs.fdatasyncSync(this.#fd);
      return 0;
    });
  }

  close(): void {
    fs.closeSync(this.#fd);
  }
}

/** Repeat `some` until it has done all of `bytes`; at least once. */
function all(syscall: string, bytes: Uint8Array, some: (done: number) => number): void {
  try {
    let done = some(0);
    while (done < bytes.length) {
      const now = some(done);
      if (now === 0) throw new HostError(syscall, "EIO", "the image became shorter");
      done += now;
    }
  } catch (error) {
    throw error instanceof HostError ? error : new HostError(syscall, errnoOf(error));
  }
}

const errnoOf = (error: unknown): string => (error as NodeJS.ErrnoException).code ?? String(error);

const CHUNK_SIZE = 2 ** 20;

/** A disk in memory, all zero at first. Takes memory for what was written only, in steps of 1 MiB. */
export class MemoryStore implements BlockStore {
  readonly sectors: number;
  readonly #chunks = new Map<number, Uint8Array>();

  constructor(sectors: number) {
    this.sectors = sectors;
  }

  read(position: number, into: Uint8Array): void {
    this.#each(position, into, (part, index, at) => {
      const chunk = this.#chunks.get(index);
      if (chunk) part.set(chunk.subarray(at, at + part.length));
      else part.fill(0);
    });
  }

  write(position: number, from: Uint8Array): void {
    this.#each(position, from, (part, index, at) => {
      const chunk = this.#chunks.get(index) ?? new Uint8Array(CHUNK_SIZE);
      chunk.set(part, at);
      this.#chunks.set(index, chunk);
    });
  }

  #each(position: number, bytes: Uint8Array, visit: (part: Uint8Array, index: number, at: number) => void) {
    for (let done = 0; done < bytes.length; ) {
      const at = (position + done) % CHUNK_SIZE;
      const length = Math.min(CHUNK_SIZE - at, bytes.length - done);
      visit(bytes.subarray(done, done + length), Math.floor((position + done) / CHUNK_SIZE), at);
      done += length;
    }
  }

  flush(): void {}
  close(): void {
    this.#chunks.clear();
  }
}
