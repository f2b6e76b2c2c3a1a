import type { GuestRegion } from "../memory/guest-memory.ts";
import type { InputRange } from "../virtio/iommu-requests.ts";

const MIB = 2 ** 20;

/**
 * The addresses that a function of QEMU's may use when it is remapped. QEMU knows nothing of our domains: it takes the
 * addresses of a vhost-user device's rings for guest physical ones, and refuses those that are not RAM. So they have to
 * look like it, whatever memory they lead to; and the RAM that begins with the second MiB is the one that has no holes.
 */
export function ringAddresses(regions: readonly GuestRegion[]): InputRange | undefined {
  const ram = regions.find(({ gpa, size }) => gpa <= MIB && gpa + size > MIB);
  return ram && { start: BigInt(MIB), end: BigInt(ram.gpa + ram.size - 1) };
}
