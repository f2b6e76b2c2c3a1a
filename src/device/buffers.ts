import type { Gpa } from "../base/units.ts";
import type { GuestAccess } from "../memory/guest-memory.ts";
import type { Buffer } from "../virtio/queue.ts";

/**
 * The part [from, from + length) of what `buffers` hold together, with neighbours in guest memory joined. VIRTIO 1.2
 * section 2.7.4.1: how a driver divides a request into buffers means nothing.
 */
export function slice(buffers: readonly Buffer[], from: number, length: number): Buffer[] {
  const parts: { gpa: Gpa; length: number }[] = [];
  let skip = from;
  let left = length;
  for (const buffer of buffers) {
    const size = Math.min(buffer.length - skip, left);
    if (size > 0) {
      const gpa = (buffer.gpa + skip) as Gpa;
      const last = parts.at(-1);
      if (last && last.gpa + last.length === gpa) last.length += size;
      else parts.push({ gpa, length: size });
      left -= size;
    }
    skip = Math.max(0, skip - buffer.length);
  }
  return parts;
}

/** Copy `into.length` bytes out of the guest, from the first byte of `buffers`, which hold as many. */
export function gather(memory: GuestAccess, buffers: readonly Buffer[], into: Uint8Array): void {
  let done = 0;
  for (const { gpa, length } of slice(buffers, 0, into.length)) {
    memory.read(gpa, into.subarray(done, done + length));
    done += length;
  }
}
