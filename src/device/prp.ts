import { CoiommuError } from "../base/errors.ts";
import type { Gpa } from "../base/units.ts";
import type { GuestAccess } from "../memory/guest-memory.ts";
import { NVME_PAGE_SIZE, PrpEntry, prpEntries } from "../wire/nvme.ts";

/** A PRP entry or list pointer that is not aligned as it must be: status PRP Offset Invalid. */
export class PrpOffsetInvalid extends CoiommuError {
  readonly code = "ERR_COIOMMU_PRP_OFFSET";
}

/** A piece is one DMA window, which an unpin waits for: neighbours are joined up to so many bytes. */
const PIECE_BYTES_MAX = 2 ** 16;

/** A piece of guest memory that PRP entries name. */
export interface PrpPiece {
  readonly gpa: Gpa;
  readonly length: number;
}

/**
 * Where the `length` bytes of a transfer are. NVM Express Base Specification 2.0, section 4.1.1. The caller bounds
 * `length`, which bounds this too: each list page but the first yields 511 entries or ends the walk.
 * Throws PrpOffsetInvalid, and what reading a list throws.
 */
export function prpPieces(memory: GuestAccess, prp1: number, prp2: number, length: number): PrpPiece[] {
  const pieces: { gpa: Gpa; length: number }[] = [];
  let left = length;
  const page = (address: number) => {
    const size = Math.min(left, NVME_PAGE_SIZE - (address % NVME_PAGE_SIZE));
    const last = pieces.at(-1);
    if (last && last.gpa + last.length === address && last.length + size <= PIECE_BYTES_MAX)
      last.length += size;
    else pieces.push({ gpa: address as Gpa, length: size });
    left -= size;
  };

  // Only the first entry may begin within a page; it addresses dwords.
  page(aligned(prp1, 4));
  if (left === 0) return pieces; // PRP2 is reserved
  if (left <= NVME_PAGE_SIZE) {
    page(aligned(prp2, NVME_PAGE_SIZE));
    return pieces;
  }
  // The first list may begin within a page, at a qword; later lists fill pages.
  let list = aligned(prp2, PrpEntry.size);
  while (left > 0) {
    const room = (NVME_PAGE_SIZE - (list % NVME_PAGE_SIZE)) / PrpEntry.size;
    const needed = prpEntries(0, left);
    const raw = new Uint8Array(PrpEntry.size * Math.min(room, needed));
    memory.read(list, raw);
    const entry = (i: number) => aligned(PrpEntry.read(raw, PrpEntry.size * i).address, NVME_PAGE_SIZE);
    // The last entry of a full page leads to the next page of the list, if there is one.
    const data = needed > room ? room - 1 : needed;
    for (let i = 0; i < data; i++) page(entry(i));
    if (needed > room) list = entry(room - 1);
  }
  return pieces;
}

function aligned(address: number, to: number): number {
  if (address % to !== 0) throw new PrpOffsetInvalid(`0x${address.toString(16)} is not a multiple of ${to}`);
  return address;
}
