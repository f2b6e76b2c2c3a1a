/**
 * Thin binding of the C library: one line per function, no policy. Safe classes are built on it in this folder.
 *
 * Memory that the kernel fills or keeps is over an explicit ArrayBuffer: V8 never moves such a backing store, and
 * the class that owns it keeps it alive. Addresses are BigInt here, numbers (< 2^47) above.
 */
import { createRequire } from "node:module";
import os from "node:os";
import type koffiModule from "koffi";
import { type Errno, HostError, UserError } from "../base/errors.ts";

let loaded: typeof koffiModule | undefined;

/** Loaded when first used: what makes no system call of its own runs where the native module does not. */
function koffi(): typeof koffiModule {
  try {
    loaded ??= createRequire(import.meta.url)("koffi") as typeof koffiModule;
  } catch (error) {
    const [reason] = (error as Error).message.split("\n");
    throw new UserError(`the native module koffi does not load on this machine: ${reason}`, 1);
  }
  return loaded;
}

/** Why system calls cannot be made here, as a clause for a person; undefined when they can. */
export function nativeUnavailable(): string | undefined {
  try {
    koffi();
    return undefined;
  } catch (error) {
    if (!(error instanceof UserError)) throw error;
    return error.message;
  }
}

const bind = <F>(prototype: string) => prototype as unknown as F;

/** Each function is bound when it is first read. */
function lazily<T extends object>(prototypes: T): T {
  for (const [name, prototype] of Object.entries(prototypes))
    Object.defineProperty(prototypes, name, {
      configurable: true,
      get() {
        const value = koffi().load(null).func(prototype);
        Object.defineProperty(prototypes, name, { value });
        return value;
      },
    });
  return prototypes;
}

type Bytes = Uint8Array | Uint32Array | Int32Array | BigUint64Array;
type FdCall = (fd: number, bytes: Bytes, count: number) => number;

/** All return -1 on failure, mmap MAP_FAILED; `lastErrno` says why until the next call. */
export const libc = lazily({
  read: bind<FdCall>("int64_t read(int, void *, size_t)"),
  write: bind<FdCall>("int64_t write(int, void *, size_t)"),
  close: bind<(fd: number) => number>("int close(int)"),
  poll: bind<(fds: Int32Array, count: number, timeoutMs: number) => number>("int poll(void *, ulong, int)"),
  eventfd: bind<(initial: number, flags: number) => number>("int eventfd(uint, int)"),
  socketpair: bind<(domain: number, type: number, protocol: number, out: Int32Array) => number>(
    "int socketpair(int, int, int, void *)",
  ),
  socket: bind<(domain: number, type: number, protocol: number) => number>("int socket(int, int, int)"),
  connect: bind<(fd: number, address: Uint8Array, length: number) => number>(
    "int connect(int, void *, uint)",
  ),
  send: bind<(fd: number, bytes: Uint8Array, count: number, flags: number) => number>(
    "int64_t send(int, void *, size_t, int)",
  ),
  sendmsg: bind<(fd: number, header: Uint32Array, flags: number) => number>(
    "int64_t sendmsg(int, void *, int)",
  ),
  recvmsg: bind<(fd: number, header: Uint32Array, flags: number) => number>(
    "int64_t recvmsg(int, void *, int)",
  ),
  memfdCreate: bind<(name: string, flags: number) => number>("int memfd_create(const char *, uint)"),
  mmap: bind<(at: null, length: number, prot: number, flags: number, fd: number, offset: number) => bigint>(
    "void *mmap(void *, size_t, int, int, int, int64_t)",
  ),
  mincore: bind<(at: bigint, length: number, out: Uint8Array) => number>(
    "int mincore(void *, size_t, void *)",
  ),
  mremap: bind<(at: bigint, oldLength: number, length: number, flags: number) => bigint>(
    "void *mremap(void *, size_t, size_t, int)",
  ),
  munmap: bind<(at: bigint, length: number) => number>("int munmap(void *, size_t)"),
  ioctl: bind<(fd: number, request: number, argument: Bytes) => number>("int ioctl(int, ulong, void *)"),
  ioctlOfNumber: bind<(fd: number, request: number, argument: number) => number>(
    "int ioctl(int, ulong, long)",
  ),
  getrlimit: bind<(resource: number, limits: BigUint64Array) => number>("int getrlimit(int, void *)"),
  setrlimit: bind<(resource: number, limits: BigUint64Array) => number>("int setrlimit(int, void *)"),
  /** syscall(2) in the shapes that are needed; the first argument is the call's number. */
  userfaultfd: bind<(number: number, flags: number) => number>("long syscall(long, int)"),
  ioUringSetup: bind<(number: number, entries: number, params: Uint32Array) => number>(
    "long syscall(long, uint, void *)",
  ),
  ioUringRegister: bind<
    (number: number, fd: number, opcode: number, argument: Uint32Array | null, count: number) => number
  >("long syscall(long, int, uint, void *, uint)"),
});

export const MAP_FAILED = 2n ** 64n - 1n;

const errnoNames = new Map<number, Errno>();
// EWOULDBLOCK and EOPNOTSUPP are second names: the first of each number stays.
for (const [name, number] of Object.entries(os.constants.errno))
  if (!errnoNames.has(number)) errnoNames.set(number, name);

export function lastErrno(): Errno {
  const number = koffi().errno();
  return errnoNames.get(number) ?? `errno ${number}`;
}

/** Do `call` until no signal interrupts it; its result, or HostError when that is negative. */
export function systemCall(name: string, call: () => number, detail = ""): number {
  for (;;) {
    const result = call();
    if (result >= 0) return result;
    throwUnlessInterrupted(name, detail);
  }
}

/** A call has failed: returns where it is to be made again. */
export function throwUnlessInterrupted(name: string, detail = ""): void {
  const errno = lastErrno();
  if (errno !== "EINTR") throw new HostError(name, errno, detail);
}

/** Not fs.closeSync: in a worker thread that warns about fds which arrived over a socket. */
export function closeFd(fd: number): void {
  // Linux closes the fd even when it reports EINTR: never retried. SAFETY: no memory.
  if (libc.close(fd) < 0 && lastErrno() !== "EINTR") throw new HostError("close", lastErrno(), `fd ${fd}`);
}

/** Address of a buffer's first byte; stable while the buffer is alive (see above). */
export const addressOf = (bytes: Bytes): number => Number(koffi().address(bytes));

/** Store a number below 2^53, as an address is, as two 32-bit words, little-endian: each keeps its own bits only. */
export function setPointer(at: Uint32Array, word: number, address: number): void {
  at[word] = address;
  at[word + 1] = address / 2 ** 32;
}

/** The same for a number of pages below 2^31, in bytes. */
export function setPages(at: Uint32Array, word: number, pages: number): void {
  at[word] = pages << 12;
  at[word + 1] = pages >>> 20;
}

/** The same way back. */
export const pointerAt = (at: Uint32Array, word: number): number => at[word]! + at[word + 1]! * 2 ** 32;

/** `length` bytes of mapped memory. The caller detaches it before it unmaps them. */
export const viewOf = (address: bigint, length: number): ArrayBuffer => koffi().view(address, length);
