import { libc, systemCall } from "./libc.ts";

const PAGE_SIZE = 4096;

/**
 * Which pages of shared mappings have no memory: 1 in `out`. For pages that are pinned that means a hole was punched,
 * because the kernel neither reclaims nor swaps them.
 *
 * To a process that may not write the file, mincore(2) says that all is there: the file is QEMU's, so be its user, or root.
 */
export function withoutMemory(addresses: Float64Array, count: number, out: Uint8Array): void {
  for (let first = 0; first < count; ) {
    let end = first + 1;
    while (end < count && addresses[end] === addresses[end - 1]! + PAGE_SIZE) end++;
    const run = out.subarray(first, end);
    const length = (end - first) * PAGE_SIZE;
    // SAFETY: writes one byte per page of the range, `run` has as many; the range is only looked at.
    systemCall("mincore", () => libc.mincore(BigInt(addresses[first]!), length, run));
    for (let i = 0; i < run.length; i++) run[i] = ~run[i]! & 1;
    first = end;
  }
}
