/**
 * Mappings in which a page without memory is given none, by userfaultfd(2). Numbers and layouts from
 * include/uapi/linux/userfaultfd.h.
 */
import { HostError } from "../base/errors.ts";
import { closeFd, lastErrno, libc, MAP_FAILED, systemCall } from "./libc.ts";

const SYS_USERFAULTFD: Readonly<Record<string, number>> = { x64: 323, arm64: 282 };
const O_CLOEXEC = 0o2000000;
/** Faults in the kernel fail. It is all that an unprivileged process may ask for (Linux 5.11). */
const UFFD_USER_MODE_ONLY = 1;
/** The version of the interface, and the type of its ioctls. */
const UFFD_API = 0xaa;
const UFFDIO_REGISTER_MODE_MISSING = 1n;
const MREMAP_MAYMOVE = 1;

/** struct uffdio_api: u64 api, features, ioctls. */
const uffdioApi = () => BigUint64Array.of(BigInt(UFFD_API), 0n, 0n);
/** struct uffdio_register: u64 start, len, mode, ioctls. */
const uffdioRegister = (address: bigint, size: number) =>
  BigUint64Array.of(address, BigInt(size), UFFDIO_REGISTER_MODE_MISSING, 0n);

/** _IOWR(UFFDIO, number, argument) of asm-generic/ioctl.h. */
const request = (number: number, argument: BigUint64Array) =>
  3 * 2 ** 30 + argument.byteLength * 2 ** 16 + UFFD_API * 2 ** 8 + number;
const API = 0x3f;
const REGISTER = 0x00;

/**
 * Second mappings of shared memory. A pin through one finds the page that the first mapping shows, or fails with EFAULT
 * where there is none: the kernel decides that in one fault, so nobody can discard the page in between, and no
 * discarded page gets its memory back. In the first mapping a pin gives every page memory.
 *
 * This process never reads or writes through them: a fault outside the kernel would wait for an answer that nobody gives.
 */
export class PresentMappings {
  readonly #refused: (reason: string) => void;
  #told = false;
  #uffd: number | undefined;
  readonly #mappings: (readonly [address: bigint, size: number])[] = [];

  /** `refused` is told, once, why some memory has no second mapping. */
  constructor(refused: (reason: string) => void) {
    this.#refused = refused;
  }

  /** Why there can be none here, as a clause for a person; undefined when they can. */
  static unavailable(): string | undefined {
    try {
      closeFd(open());
      return undefined;
    } catch (error) {
      if (!(error instanceof HostError)) throw error;
      return error.message;
    }
  }

  /** Address of a second mapping of `size` bytes that are mapped at `address`; undefined where the kernel makes none. */
  of(address: number, size: number): number | undefined {
    try {
      this.#uffd ??= open();
      const second = mapAgain(this.#uffd, BigInt(address), size);
      this.#mappings.push([second, size]);
      return Number(second);
    } catch (error) {
      if (!(error instanceof HostError)) throw error;
      if (!this.#told) this.#refused(error.message);
      this.#told = true;
      return undefined;
    }
  }

  /** Nobody pins through them any more. What is pinned stays. */
  close(): void {
    for (const mapping of this.#mappings.splice(0)) unmap(...mapping);
    if (this.#uffd !== undefined) closeFd(this.#uffd);
    this.#uffd = undefined;
  }
}

function open(): number {
  const number = SYS_USERFAULTFD[process.arch];
  if (number === undefined) throw new HostError("userfaultfd", "ENOSYS", process.arch);
  // SAFETY: takes no memory.
  const uffd = systemCall("userfaultfd", () => libc.userfaultfd(number, O_CLOEXEC | UFFD_USER_MODE_ONLY));
  try {
    control(uffd, "UFFDIO_API", API, uffdioApi());
    return uffd;
  } catch (error) {
    closeFd(uffd);
    throw error;
  }
}

function control(uffd: number, name: string, number: number, argument: BigUint64Array): void {
  // SAFETY: `argument` is the structure whose size the request names; the kernel fills it in and keeps no pointer.
  systemCall(`ioctl ${name}`, () => libc.ioctl(uffd, request(number, argument), argument));
}

function mapAgain(uffd: number, address: bigint, size: number): bigint {
  // SAFETY: an old size of 0 leaves the first mapping as it is and maps its memory a second time (mremap(2)).
  const second = libc.mremap(address, 0, size, MREMAP_MAYMOVE);
  if (second === MAP_FAILED) throw new HostError("mremap", lastErrno(), `${size} bytes`);
  try {
    control(uffd, "UFFDIO_REGISTER", REGISTER, uffdioRegister(second, size));
    return second;
  } catch (error) {
    unmap(second, size);
    throw error;
  }
}

function unmap(address: bigint, size: number): void {
  // SAFETY: the range is one that mremap returned; no view of it was ever made.
  systemCall("munmap", () => libc.munmap(address, size));
}
