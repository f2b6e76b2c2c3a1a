import { HostError, PeerGone, ProtocolError } from "../base/errors.ts";
import { addressOf, closeFd, libc, setPointer, systemCall } from "./libc.ts";

const AF_UNIX = 1;
const SOCK_STREAM = 1;
const SOCK_CLOEXEC = 0o2000000;
const SOCK_NONBLOCK = 0o4000;
/** sockaddr_un: u16 family, then the path and a 0. */
const PATH_MAX = 107;
const SOL_SOCKET = 1;
const SCM_RIGHTS = 1;
const MSG_CTRUNC = 0x8;
const MSG_WAITALL = 0x100;
const MSG_NOSIGNAL = 0x4000;
const MSG_CMSG_CLOEXEC = 0x4000_0000;

/** More than any message of the protocols here: vhost-user and mpqemu send at most 8. The kernel allows 253. */
export const FDS_MAX = 16;
/** cmsghdr: u64 length (with header), i32 level, i32 type; then the fds. As 32-bit words, little-endian. */
const CMSG = { length: 0, level: 2, type: 3, data: 4 } as const;
const CMSG_WORDS = CMSG.data + FDS_MAX;
/** msghdr of a 64-bit Linux: 7 words of 64 bits, here as indices of 32-bit words. */
const MSGHDR = { iov: 4, iovCount: 6, control: 8, controlLength: 10, flags: 12, words: 14 } as const;
/** iovec: u64 base, u64 length. */
const IOVEC = { base: 0, length: 2, words: 4 } as const;

const words = (count: number) => new Uint32Array(new ArrayBuffer(4 * count));

/** One end of an AF_UNIX stream socket in blocking mode. Owns its fd. */
export class UnixSocket {
  readonly fd: number;
  #open = true;
  #data = new Uint8Array(new ArrayBuffer(4096));
  #dataAddress = addressOf(this.#data);
  readonly #control = words(CMSG_WORDS);
  readonly #iovec = words(IOVEC.words);
  readonly #header = words(MSGHDR.words);

  constructor(fd: number) {
    this.fd = fd;
    setPointer(this.#header, MSGHDR.iov, addressOf(this.#iovec));
    this.#header[MSGHDR.iovCount] = 1;
    setPointer(this.#header, MSGHDR.control, addressOf(this.#control));
  }

  /**
   * Wait for exactly `size` bytes and the fds that came with them, which then belong to the caller. The bytes are
   * valid until the next receive. Throws PeerGone at the end of the stream; ProtocolError for more than 16 fds.
   */
  receive(size: number): { bytes: Uint8Array; fds: number[] } {
    if (size > this.#data.length) {
      this.#data = new Uint8Array(new ArrayBuffer(size));
      this.#dataAddress = addressOf(this.#data);
    }
    const fds: number[] = [];
    try {
      // MSG_WAITALL stops short at a signal, and between messages that carry fds.
      for (let done = 0; done < size; ) done += this.#receiveSome(done, size - done, fds);
    } catch (error) {
      fds.forEach(closeFd);
      throw error;
    }
    return { bytes: this.#data.subarray(0, size), fds };
  }

  #receiveSome(offset: number, size: number, fds: number[]): number {
    setPointer(this.#iovec, IOVEC.base, this.#dataAddress + offset);
    this.#iovec[IOVEC.length] = size;
    this.#header[MSGHDR.controlLength] = CMSG_WORDS * 4;
    // SAFETY: header, iovec, control and data are fields of this object; offset + size is within data.
    const got = this.#call("recvmsg", () =>
      libc.recvmsg(this.fd, this.#header, MSG_WAITALL | MSG_CMSG_CLOEXEC),
    );
    this.#takeFds(fds);
    if (this.#header[MSGHDR.flags]! & MSG_CTRUNC)
      throw new ProtocolError("the peer sent more file descriptors than fit: 16, or RLIMIT_NOFILE");
    if (got === 0) throw new PeerGone("the peer closed the connection");
    return got;
  }

  #takeFds(fds: number[]): void {
    const end = this.#header[MSGHDR.controlLength]! / 4;
    const control = this.#control;
    for (let at = 0; at + CMSG.data <= end; ) {
      const length = control[at + CMSG.length]! / 4;
      if (control[at + CMSG.level] === SOL_SOCKET && control[at + CMSG.type] === SCM_RIGHTS)
        for (let i = CMSG.data; i < length; i++) fds.push(control[at + i]!);
      // The next header is 8-byte aligned.
      at += Math.max(CMSG.data, 2 * Math.ceil(length / 2));
    }
  }

  /** Send all of `bytes`; the fds, at most 16, ride on the first byte and stay the caller's. Throws PeerGone. */
  send(bytes: Uint8Array, fds: readonly number[] = []): void {
    let done = fds.length > 0 ? this.#sendWithFds(bytes, fds) : 0;
    while (done < bytes.length) {
      const rest = done === 0 ? bytes : bytes.subarray(done);
      // SAFETY: `rest` is referenced here during the call.
      done += this.#call("send", () => libc.send(this.fd, rest, rest.length, MSG_NOSIGNAL));
    }
  }

  #sendWithFds(bytes: Uint8Array, fds: readonly number[]): number {
    if (fds.length > FDS_MAX) throw new RangeError(`${fds.length} file descriptors in one message`);
    setPointer(this.#iovec, IOVEC.base, addressOf(bytes));
    this.#iovec[IOVEC.length] = bytes.length;
    this.#control[CMSG.length] = 4 * (CMSG.data + fds.length);
    this.#control[CMSG.length + 1] = 0;
    this.#control[CMSG.level] = SOL_SOCKET;
    this.#control[CMSG.type] = SCM_RIGHTS;
    this.#control.set(fds, CMSG.data);
    // CMSG_SPACE: the fds padded to 8 bytes.
    this.#header[MSGHDR.controlLength] = 4 * (CMSG.data + 2 * Math.ceil(fds.length / 2));
    // SAFETY: header, iovec and control are fields of this object; `bytes` is referenced here during the call.
    return this.#call("sendmsg", () => libc.sendmsg(this.fd, this.#header, MSG_NOSIGNAL));
  }

  #call(syscall: string, call: () => number): number {
    try {
      return systemCall(syscall, call);
    } catch (error) {
      if (error instanceof HostError && (error.errno === "EPIPE" || error.errno === "ECONNRESET"))
        throw new PeerGone("the peer closed the connection");
      throw error;
    }
  }

  close(): void {
    if (this.#open) closeFd(this.fd);
    this.#open = false;
  }
}

/** An fd connected to the socket at `path`, not blocking: EAGAIN when its server has no place for us. */
export function connectSocket(path: string): number {
  const name = Buffer.from(path);
  if (name.length > PATH_MAX) throw new HostError("connect", "ENAMETOOLONG", path);
  const address = new Uint8Array(new ArrayBuffer(2 + name.length + 1));
  address[0] = AF_UNIX;
  address.set(name, 2);
  // SAFETY: no memory.
  const fd = systemCall("socket", () => libc.socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  try {
    // SAFETY: the kernel reads `address`, which is referenced here, in full.
    systemCall("connect", () => libc.connect(fd, address, address.length), path);
    return fd;
  } catch (error) {
    closeFd(fd);
    throw error;
  }
}

/** Two connected fds; not inherited by children except where spawn's `stdio` says so. */
export function socketPair(): [number, number] {
  const out = new Int32Array(new ArrayBuffer(8));
  // SAFETY: `out` has room for two ints.
  systemCall("socketpair", () => libc.socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, out));
  return [out[0]!, out[1]!];
}
