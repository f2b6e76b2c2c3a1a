import fs from "node:fs";
import { basename } from "node:path";
import { HostError } from "../base/errors.ts";
import { ioctl } from "./ioctl.ts";
import { mapShared, unmap } from "./mapping.ts";

/** What VFIO is used by: a kernel's files and calls. Numbers and layouts are those of wire/vfio.ts. */
export interface VfioKernel {
  /** Name of what a link leads to, or undefined. */
  link(path: string): string | undefined;
  /** What a small file has, or undefined. */
  text(path: string): string | undefined;
  /** Names in a folder; none when there is none. */
  list(path: string): string[];
  /** For reading and writing. This and all below throw HostError. */
  open(path: string): number;
  close(fd: number): void;
  /** See Ioctl. */
  ioctl(fd: number, name: string, request: number, argument: number | Uint8Array): number;
  read(fd: number, into: Uint8Array, offset: number): void;
  write(fd: number, from: Uint8Array, offset: number): void;
  /** Returns an address that all threads of this process may use. */
  map(fd: number, size: number, offset: number): number;
  unmap(address: number, size: number): void;
}

/** What Node says of a system call, as HostError. */
function asHostError<T>(syscall: string, detail: string, call: () => T): T {
  try {
    return call();
  } catch (error) {
    throw new HostError(syscall, (error as NodeJS.ErrnoException).code ?? "EIO", detail);
  }
}

/** The kernel that this process runs on. */
export const linux: VfioKernel = {
  link(path) {
    try {
      return basename(fs.readlinkSync(path));
    } catch {
      return undefined;
    }
  },
  text(path) {
    try {
      return fs.readFileSync(path, "latin1");
    } catch {
      return undefined;
    }
  },
  list: (path) => (fs.existsSync(path) ? fs.readdirSync(path) : []),
  open: (path) => asHostError("open", path, () => fs.openSync(path, "r+")),
  close: (fd) => asHostError("close", `fd ${fd}`, () => fs.closeSync(fd)),
  ioctl,
  read(fd, into, offset) {
    const done = asHostError("pread", `fd ${fd}`, () => fs.readSync(fd, into, 0, into.length, offset));
    if (done !== into.length) throw new HostError("pread", "EIO", `${done} of ${into.length} bytes`);
  },
  write(fd, from, offset) {
    const done = asHostError("pwrite", `fd ${fd}`, () => fs.writeSync(fd, from, 0, from.length, offset));
    if (done !== from.length) throw new HostError("pwrite", "EIO", `${done} of ${from.length} bytes`);
  },
  map: mapShared,
  unmap,
};
