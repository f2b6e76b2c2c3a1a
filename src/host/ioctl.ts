import { addressOf, libc, throwUnlessInterrupted } from "./libc.ts";

/**
 * A structure that is passed to the kernel again and again, as 32-bit words: its memory stays where it is, so its address
 * is looked up once, which is a third of what a call costs on the way out of JavaScript.
 */
export class KernelStruct {
  readonly bytes: Uint8Array<ArrayBuffer>;
  readonly words: Uint32Array<ArrayBuffer>;
  readonly address: number;

  constructor(bytes: Uint8Array<ArrayBuffer>) {
    this.bytes = bytes;
    this.words = new Uint32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4);
    this.address = addressOf(this.words);
  }
}

/**
 * ioctl(2) with a number, or with a structure that the kernel reads and fills; returns what the kernel does. `name` is
 * for the HostError that it throws. An argument of whoever uses it, so that another kernel can stand behind it.
 */
export type Ioctl = (
  fd: number,
  name: string,
  request: number,
  argument: number | Uint8Array | KernelStruct,
) => number;

/** As systemCall(), whose closure an emulated CPU would notice at every pin. */
export const ioctl: Ioctl = (fd, name, request, argument) => {
  for (;;) {
    const result = once(fd, request, argument);
    if (result >= 0) return result;
    throwUnlessInterrupted(name);
  }
};

/** SAFETY: the caller's structure has the size that this request has, or says its own, and the kernel keeps to that. */
function once(fd: number, request: number, argument: number | Uint8Array | KernelStruct): number {
  if (typeof argument === "number") return libc.ioctlOfNumber(fd, request, argument);
  return argument instanceof KernelStruct
    ? libc.ioctlOfNumber(fd, request, argument.address)
    : libc.ioctl(fd, request, argument);
}
