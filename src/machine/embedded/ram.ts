import { HostError, UserError } from "../../base/errors.ts";
import type { Gpa } from "../../base/units.ts";
import { SharedMapping } from "../../host/mapping.ts";
import type { GuestRegion } from "../../memory/guest-memory.ts";

/**
 * The RAM of a guest whose CPUs are threads of this process: from GPA 0 on, without a hole. Memory that the host is
 * to pin has an address; other memory is Node's own.
 */
export type GuestRam = SharedArrayBuffer | { readonly address: number; readonly size: number };

/** Only reserved: the kernel commits the pages that the guest uses. */
export class OwnedRam {
  readonly ram: GuestRam;
  readonly #mapping: SharedMapping | undefined;

  /** Throws UserError when this machine cannot reserve so much. */
  constructor(memoryMiB: number, pinned: boolean) {
    const size = memoryMiB * 2 ** 20;
    try {
      this.#mapping = pinned ? new SharedMapping(size) : undefined;
      this.ram = this.#mapping ? { address: this.#mapping.address, size } : new SharedArrayBuffer(size);
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

export const ramRegion = (ram: GuestRam): GuestRegion =>
  ram instanceof SharedArrayBuffer
    ? { gpa: 0 as Gpa, size: ram.byteLength, hostAddress: 0, bytes: new Uint8Array(ram) }
    : { gpa: 0 as Gpa, size: ram.size, hostAddress: ram.address, bytes: SharedMapping.bytes(ram) };
