import { HostError } from "../base/errors.ts";
import { closeFd, lastErrno, libc, systemCall } from "./libc.ts";

const EFD_NONBLOCK = 0o4000;
const EFD_CLOEXEC = 0o2000000;

const one = new BigUint64Array([1n]);
const drained = new BigUint64Array(1);

/** Signal an eventfd, also one that a peer sent. A counter that is full or a reader that is gone is no error. */
export function signalFd(fd: number): void {
  // SAFETY: `one` lives as long as the module and holds the 8 bytes that are read.
  if (libc.write(fd, one, 8) < 0) ignore("write", fd);
}

/** Reset an eventfd that was polled readable, so that the next signal wakes poll again. */
export function drainFd(fd: number): void {
  // SAFETY: `drained` lives as long as the module and has room for 8 bytes.
  if (libc.read(fd, drained, 8) < 0) ignore("read", fd);
}

function ignore(syscall: string, fd: number): void {
  const errno = lastErrno();
  if (errno !== "EAGAIN" && errno !== "EINTR" && errno !== "EPIPE")
    throw new HostError(syscall, errno, `eventfd ${fd}`);
}

export class EventFd {
  readonly fd: number;
  #open = true;

  private constructor(fd: number) {
    this.fd = fd;
  }

  static create(): EventFd {
    // SAFETY: no memory.
    return new EventFd(systemCall("eventfd", () => libc.eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)));
  }

  signal(): void {
    signalFd(this.fd);
  }
  drain(): void {
    drainFd(this.fd);
  }
  close(): void {
    if (this.#open) closeFd(this.fd);
    this.#open = false;
  }
}
