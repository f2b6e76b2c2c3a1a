/**
 * Rings of io_uring(7) for the sake of their registered buffers only: nothing is ever submitted. Numbers from
 * include/uapi/linux/io_uring.h; sparse tables need Linux 5.19.
 */
import fs from "node:fs";
import { HostError } from "../base/errors.ts";
import { addressOf, closeFd, libc, setPointer, systemCall } from "./libc.ts";

const SYS_IO_URING_SETUP = 425;
const SYS_IO_URING_REGISTER = 427;
const UNREGISTER_BUFFERS = 1;
const REGISTER_BUFFERS2 = 15;
const REGISTER_BUFFERS_UPDATE = 16;
const RSRC_REGISTER_SPARSE = 1;

/** struct io_uring_params is 120 bytes; all zero asks for defaults. */
const PARAMS_WORDS = 30;
/** struct io_uring_rsrc_register: u32 nr, u32 flags, u64 resv2, data, tags; as 32-bit words. */
const REGISTER = { nr: 0, flags: 1, words: 8 } as const;
/** struct io_uring_rsrc_update2: u32 offset, u32 resv, u64 data, tags, u32 nr, u32 resv2; as 32-bit words. */
const UPDATE = { offset: 0, data: 2, nr: 6, words: 8 } as const;
/** struct iovec as 32-bit words: u64 base, u64 length. */
const IOVEC_WORDS = 4;

/** IORING_MAX_REG_BUFFERS: the slots that one ring may have. */
export const SLOTS_PER_RING = 16384;
/** Buffers that one call updates: 16 KiB of iovecs, by when the cost of the call no longer shows. */
const BATCH = 1024;

const words = (count: number) => new Uint32Array(new ArrayBuffer(4 * count));

/** An iovec array and the request that points to it; one serves all rings of a pinner. */
export class BufferUpdate {
  readonly #iovecs = words(BATCH * IOVEC_WORDS);
  readonly #request = words(UPDATE.words);

  constructor() {
    setPointer(this.#request, UPDATE.data, addressOf(this.#iovecs));
  }

  /** How many buffers fit into one run(). */
  readonly capacity = BATCH;

  /** Buffer `index` of the next run(). Length 0 at address 0 empties the slot. */
  set(index: number, address: number, length: number): void {
    const at = index * IOVEC_WORDS;
    setPointer(this.#iovecs, at, address);
    this.#iovecs[at + 2] = length;
  }

  /** Put buffers 0..count-1 into slots `slot`... Returns how many were; throws HostError when not even one. */
  run(ring: number, slot: number, count: number): number {
    this.#request[UPDATE.offset] = slot;
    this.#request[UPDATE.nr] = count;
    // SAFETY: request and iovecs are fields of this object, with room for BATCH >= count buffers. The kernel pins
    // the named pages; it neither reads nor writes them, as nothing is submitted to the ring.
    return systemCall("io_uring_register", () =>
      libc.ioUringRegister(
        SYS_IO_URING_REGISTER,
        ring,
        REGISTER_BUFFERS_UPDATE,
        this.#request,
        UPDATE.words * 4,
      ),
    );
  }
}

/** A ring with an empty table of `slots` buffers; its fd. */
export function openRing(slots: number): number {
  const params = words(PARAMS_WORDS);
  const request = words(REGISTER.words);
  request[REGISTER.nr] = slots;
  request[REGISTER.flags] = RSRC_REGISTER_SPARSE;
  // SAFETY: `params` has the size of struct io_uring_params; the ring's own memory is never mapped.
  const ring = systemCall("io_uring_setup", () => libc.ioUringSetup(SYS_IO_URING_SETUP, 1, params));
  try {
    // SAFETY: `request` has the size that is passed.
    systemCall("io_uring_register", () =>
      libc.ioUringRegister(SYS_IO_URING_REGISTER, ring, REGISTER_BUFFERS2, request, REGISTER.words * 4),
    );
  } catch (error) {
    closeFd(ring);
    throw error;
  }
  return ring;
}

/** Release all buffers before it returns (closing the fd alone would do so some time later), then the ring. */
export function closeRing(ring: number): void {
  // SAFETY: takes no memory.
  systemCall("io_uring_register", () =>
    libc.ioUringRegister(SYS_IO_URING_REGISTER, ring, UNREGISTER_BUFFERS, null, 0),
  );
  closeFd(ring);
}

/** Why this process cannot use io_uring for pins: one clause, for a person; undefined when it can. */
export function ioUringUnavailable(): string | undefined {
  try {
    closeRing(openRing(1));
    return undefined;
  } catch (error) {
    if (!(error instanceof HostError)) throw error;
    if (error.syscall === "io_uring_register" && error.errno === "EINVAL")
      return "this kernel has no sparse buffer tables (Linux 5.19 or later is needed)";
    if (error.errno === "ENOSYS") return "this kernel is built without io_uring, or a sandbox hides it";
    if (error.errno === "EPERM") return `io_uring is forbidden: ${sysctlReason()}`;
    return error.message;
  }
}

function sysctlReason(): string {
  try {
    const value = fs.readFileSync("/proc/sys/kernel/io_uring_disabled", "latin1").trim();
    if (value !== "0") return `sysctl kernel.io_uring_disabled is ${value}`;
  } catch {
    // Before Linux 6.6 there is no such switch.
  }
  return "a seccomp filter of the container refuses it (Docker and Kubernetes do by default)";
}
