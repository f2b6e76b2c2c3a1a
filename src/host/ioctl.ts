import { libc, systemCall } from "./libc.ts";

/**
 * ioctl(2) with a number, or with a structure that the kernel reads and fills; returns what the kernel does. `name` is
 * for the HostError that it throws. An argument of whoever uses it, so that another kernel can stand behind it.
 */
export type Ioctl = (
  fd: number,
  name: string,
  request: number,
  argument: number | Uint8Array | Uint32Array,
) => number;

export const ioctl: Ioctl = (fd, name, request, argument) =>
  systemCall(name, () =>
    // SAFETY: the caller's structure has the size that this request has, or says its own, and the kernel keeps to that.
    typeof argument === "number"
      ? libc.ioctlOfNumber(fd, request, argument)
      : libc.ioctl(fd, request, argument),
  );

/** The same structure as 32-bit words. */
export const wordsFrom = (bytes: Uint8Array<ArrayBuffer>): Uint32Array<ArrayBuffer> =>
  new Uint32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4);
