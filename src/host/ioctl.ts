import { libc, systemCall } from "./libc.ts";

/**
 * ioctl(2) with a structure or a number as its argument; `name` is for the HostError that it throws. An argument of
 * whoever uses it, so that another kernel can stand behind it.
 */
export type Ioctl = (fd: number, name: string, request: number, argument: Uint32Array | number) => number;

export const ioctl: Ioctl = (fd, name, request, argument) =>
  systemCall(name, () =>
    // SAFETY: the caller passes a structure of the size that this request has, and keeps what it points to.
    typeof argument === "number"
      ? libc.ioctlOfNumber(fd, request, argument)
      : libc.ioctl(fd, request, argument),
  );

/** A structure of which the kernel keeps no pointer, as words that stay where they are. */
export function wordsFrom(bytes: Uint8Array<ArrayBuffer>): Uint32Array<ArrayBuffer> {
  return new Uint32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4);
}
