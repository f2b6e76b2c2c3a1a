import { HostError, UserError } from "../../base/errors.ts";
import type { Gpa } from "../../base/units.ts";
import { SharedMapping } from "../../host/mapping.ts";
import type { GuestRegion } from "../../memory/guest-memory.ts";

/** Addresses that an IOMMU has for itself, in whole frames: no RAM is there, and what would be comes behind them. */
export interface Hole {
  readonly start: number;
  readonly size: number;
}

/**
 * The RAM of a guest whose CPUs are threads of this process: from GPA 0 on. Memory that the host is to pin has an address;
 * other memory is Node's own.
 */
export type GuestRam =
  | SharedArrayBuffer
  | { readonly address: number; readonly size: number; readonly hole?: Hole };

/** Only reserved: the kernel commits the pages that the guest uses. */
export class OwnedRam {
  readonly ram: GuestRam;
  readonly #mapping: SharedMapping | undefined;

  /** `hole`: of memory that is pinned. Throws UserError when this machine cannot reserve so much. */
  constructor(memoryMiB: number, pinned: boolean, hole?: Hole) {
    const size = memoryMiB * 2 ** 20;
    try {
      this.#mapping = pinned ? new SharedMapping(size) : undefined;
      this.ram = this.#mapping
        ? { address: this.#mapping.address, size, ...(hole && { hole }) }
        : new SharedArrayBuffer(size);
    } catch (error) {
      if (!(error instanceof RangeError || error instanceof HostError)) throw error;
      throw new UserError(`--memory: this machine cannot reserve ${memoryMiB} MiB for the guest`, 1);
    }
  }

  /** When no thread uses it any more. */
  close(): void {
    this.#mapping?.close();
  }
}

/** Ascending. */
export function ramRegions(ram: GuestRam): GuestRegion[] {
  if (ram instanceof SharedArrayBuffer)
    return [{ gpa: 0 as Gpa, size: ram.byteLength, hostAddress: 0, bytes: new Uint8Array(ram) }];
  const bytes = SharedMapping.bytes(ram);
  const part = (start: number, end: number, shift: number): GuestRegion => ({
    gpa: (start + shift) as Gpa,
    size: end - start,
    hostAddress: ram.address + start,
    bytes: bytes.subarray(start, end),
  });
  const { size, hole } = ram;
  return hole ? [part(0, hole.start, 0), part(hole.start, size, hole.size)] : [part(0, size, 0)];
}

/** Where it ends. */
export const ramEnd = (ram: GuestRam): number =>
  ram instanceof SharedArrayBuffer ? ram.byteLength : ram.size + (ram.hole?.size ?? 0);
