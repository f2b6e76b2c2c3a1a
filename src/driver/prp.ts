import { invariant } from "../base/errors.ts";
import type { Gpa, Iova } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import { NVME_PAGE_SIZE, PRP_LIST_ENTRIES, PrpEntry, prpEntries } from "../wire/nvme.ts";
import type { DmaApi, DmaBuffer, DmaSegment } from "./dma-api.ts";

/** Lists of up to so many entries share pages, as in Linux's nvme. */
const SMALL_ENTRIES = 32;

/** A place for entries. */
interface Block {
  readonly gpa: Gpa;
  readonly iova: Iova;
  readonly entries: number;
}

/** A command's data pointer, and the blocks that hold its list. */
export interface PrpList {
  readonly blocks: readonly Block[];
  /** Entries behind the first. */
  readonly entries: number;
}

/**
 * Memory for PRP lists, taken from allocCoherent as it is needed and kept until close(): the lists themselves are
 * DMA, and must not be mapped and unmapped with each request.
 */
export class PrpPool {
  readonly #memory: GuestMemory;
  readonly #dma: DmaApi;
  readonly #pages: { gpa: Gpa; iova: Iova }[] = [];
  readonly #small: Block[] = [];
  readonly #large: Block[] = [];

  constructor(memory: GuestMemory, dma: DmaApi) {
    this.#memory = memory;
    this.#dma = dma;
  }

  /** Room for the list of a transfer into `buffers`. Throws DmaMapFailed, and has then taken nothing. */
  take(buffers: readonly DmaBuffer[]): PrpList {
    const length = buffers.reduce((sum, b) => sum + b.length, 0);
    const entries = length === 0 ? 0 : prpEntries(buffers[0]!.gpa % NVME_PAGE_SIZE, length) - 1;
    const blocks: Block[] = [];
    const list = { blocks, entries };
    if (entries < 2) return list;
    try {
      // A list page that is followed by another gives it one entry.
      const chained = Math.ceil((entries - 1) / (PRP_LIST_ENTRIES - 1));
      if (entries <= SMALL_ENTRIES) blocks.push(this.#block(this.#small, SMALL_ENTRIES));
      else for (let i = 0; i < chained; i++) blocks.push(this.#block(this.#large, PRP_LIST_ENTRIES));
    } catch (error) {
      this.give(list);
      throw error;
    }
    return list;
  }

  give({ blocks }: PrpList): void {
    for (const b of blocks) (b.entries === SMALL_ENTRIES ? this.#small : this.#large).push(b);
  }

  /** Write the list for `segments`. Returns PRP1 and PRP2. NVM Express Base Specification 2.0, section 4.1.1. */
  fill({ blocks, entries }: PrpList, segments: readonly DmaSegment[]): { prp1: number; prp2: number } {
    const pages = pagesOf(segments);
    invariant(pages.length === entries + 1, "the mapping has the layout of its buffers");
    const prp1 = pages[0]!;
    if (entries < 2) return { prp1, prp2: pages[1] ?? 0 };
    let next = 1;
    for (const [i, block] of blocks.entries()) {
      const follower = blocks[i + 1];
      const data = Math.min(pages.length - next, block.entries - (follower ? 1 : 0));
      const raw = new Uint8Array(PrpEntry.size * (data + (follower ? 1 : 0)));
      for (let e = 0; e < data; e++) PrpEntry.write(raw, { address: pages[next++]! }, PrpEntry.size * e);
      if (follower) PrpEntry.write(raw, { address: follower.iova }, PrpEntry.size * data);
      this.#memory.write(block.gpa, raw);
    }
    return { prp1, prp2: blocks[0]!.iova };
  }

  /** All lists were given back. */
  close(): void {
    for (const { gpa, iova } of this.#pages) this.#dma.freeCoherent(gpa, iova, NVME_PAGE_SIZE);
    this.#pages.length = this.#small.length = this.#large.length = 0;
  }

  #block(free: Block[], entries: number): Block {
    if (free.length === 0) {
      const page = this.#dma.allocCoherent(NVME_PAGE_SIZE);
      this.#pages.push(page);
      for (let at = 0; at < NVME_PAGE_SIZE; at += entries * PrpEntry.size)
        free.push({ gpa: (page.gpa + at) as Gpa, iova: (page.iova + at) as Iova, entries });
    }
    return free.pop()!;
  }
}

/** The address in each page: only the first may begin, and only the last end, within a page. */
function pagesOf(segments: readonly DmaSegment[]): number[] {
  const pages: number[] = [];
  segments.forEach(({ iova, length }, i) => {
    const end = iova + length;
    invariant(i === 0 || iova % NVME_PAGE_SIZE === 0, "a gap before a segment");
    invariant(i === segments.length - 1 || end % NVME_PAGE_SIZE === 0, "a gap behind a segment");
    for (let at: number = iova; at < end; at += NVME_PAGE_SIZE - (at % NVME_PAGE_SIZE)) pages.push(at);
  });
  return pages;
}
