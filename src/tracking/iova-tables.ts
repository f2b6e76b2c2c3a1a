import { invariant } from "../base/errors.ts";
import type { SharedWords } from "../memory/shared-words.ts";
import type { Mapping } from "./mapping-trees.ts";

/**
 * The address spaces of domains as devices read them, without locks: radix tables of four levels in pages of 1,024
 * words, as a hardware IOMMU's in memory. An upper entry is a table's page + 1; a leaf entry is `gfn << 2 | flags`;
 * 0 is absent. The backend alone writes them.
 */
const LEVELS = 4;
const ENTRY_BITS = 10;
const ENTRIES = 1 << ENTRY_BITS;

/** Pages of a device's address space: 2^52 bytes, which a JavaScript number holds exactly. */
export const IOVA_PAGES = 2 ** (LEVELS * ENTRY_BITS);
/** Frames that a leaf entry can name: 4 TiB of guest. */
export const ENTRY_FRAMES = 2 ** 30;
export const ENTRY_FLAGS = 3;

const indexOf = (page: number, level: number): number =>
  Math.floor(page / 2 ** (ENTRY_BITS * level)) % ENTRIES;

/**
 * The leaf entry of `page`, as a device finds it.
 *
 * ORDERING: acquire. A table is zeroed before it is linked, and is unlinked for a whole quiesce before it is used again,
 * so inside a DMA window every entry leads to a table of this domain. PAIRS WITH #table() and #reclaim().
 */
export function walk(words: SharedWords, pool: number, root: number, page: number): number {
  if (page >= IOVA_PAGES) return 0;
  let table = root;
  for (let level = LEVELS - 1; level > 0; level--) {
    const entry = words.load(pool + table * ENTRIES + indexOf(page, level));
    if (entry === 0) return 0;
    table = entry - 1;
  }
  return words.load(pool + table * ENTRIES + indexOf(page, 0));
}

/** What a table page is: beside these, the index of the word that points to it. */
const FREE = -1;
const ROOT = -2;
/** A root without a domain. */
const DEAD = -3;

/**
 * The backend's side. Tables stay when they are empty, and are taken back when room is needed: a driver that maps and
 * unmaps one buffer again and again builds its tables once.
 */
export class IovaTables {
  readonly #words: SharedWords;
  readonly #pool: number;
  /** Waits until no device can be in a table that was unlinked before; false when it cannot be known. */
  readonly #quiesce: () => boolean;
  readonly #link: Float64Array;
  /** Entries of each table page that are in use. */
  readonly #used: Uint16Array;
  readonly #free: number[] = [];
  /** Table pages from here on were never used. */
  #fresh = 0;

  /** The words from `pool` on are `pages` table pages, zeroed. */
  constructor(words: SharedWords, pool: number, pages: number, quiesce: () => boolean) {
    this.#words = words;
    this.#pool = pool;
    this.#quiesce = quiesce;
    this.#link = new Float64Array(pages).fill(FREE);
    this.#used = new Uint16Array(pages);
  }

  /** An empty address space; undefined when there is no room. */
  create(): number | undefined {
    if (this.#room < 1) this.#reclaim();
    const root = this.#take();
    if (root !== undefined) this.#link[root] = ROOT;
    return root;
  }

  /** No device is attached to `root`, and nothing is mapped in it. */
  destroy(root: number): void {
    this.#link[root] = DEAD;
  }

  /** False when there is no room: then nothing is mapped. */
  map(root: number, { first, last, gfn, flags }: Mapping): boolean {
    // Only here, before anything is built: what is built and still empty would be taken back.
    if (this.#room < tablesOf(first, last)) this.#reclaim();
    for (let page = first; page <= last; ) {
      const leaf = this.#leaf(root, page, true);
      if (leaf === undefined) {
        if (page > first) this.unmap(root, { first, last: page - 1 });
        return false;
      }
      for (const end = endOf(page, last); page < end; page++) {
        // ORDERING: release. The frame was pinned before.
        const entry = ((gfn + (page - first)) * 4 + (flags & ENTRY_FLAGS)) | 0;
        this.#words.store(this.#at(leaf, indexOf(page, 0)), entry);
        this.#used[leaf]!++;
      }
    }
    return true;
  }

  /** Clear what was mapped. The caller must quiesce() before the frames are used for anything else. */
  unmap(root: number, { first, last }: Pick<Mapping, "first" | "last">): void {
    for (let page = first; page <= last; ) {
      const leaf = this.#leaf(root, page, false);
      invariant(leaf !== undefined, `page ${page} is not mapped`);
      for (const end = endOf(page, last); page < end; page++) {
        this.#words.store(this.#at(leaf, indexOf(page, 0)), 0);
        this.#used[leaf]!--;
      }
    }
  }

  /** The table that has the leaf entry of `page`. `build`: it is made when it is absent, and there is room. */
  #leaf(root: number, page: number, build: boolean): number | undefined {
    let table: number | undefined = root;
    for (let level = LEVELS - 1; level > 0 && table !== undefined; level--)
      table = this.#table(this.#at(table, indexOf(page, level)), build);
    return table;
  }

  /** The table that the upper entry at `at` points to. */
  #table(at: number, build: boolean): number | undefined {
    const entry = this.#words.load(at);
    if (entry !== 0) return entry - 1;
    if (!build) return undefined;
    const table = this.#take();
    if (table === undefined) return undefined;
    this.#link[table] = at;
    this.#setLink(table, true);
    return table;
  }

  get #room(): number {
    return this.#free.length + this.#used.length - this.#fresh;
  }

  #take(): number | undefined {
    return this.#free.pop() ?? (this.#fresh < this.#used.length ? this.#fresh++ : undefined);
  }

  #setLink(table: number, linked: boolean): void {
    const at = this.#link[table]!;
    // ORDERING: release. A table that is free is all zero.
    this.#words.store(at, linked ? table + 1 : 0);
    this.#used[Math.floor((at - this.#pool) / ENTRIES)]! += linked ? 1 : -1;
  }

  /** Take back all empty tables. */
  #reclaim(): void {
    const unlinked: number[] = [];
    // A table whose last table goes is empty too, one level up.
    for (let level = 1; level < LEVELS; level++)
      for (let table = 0; table < this.#used.length; table++)
        if (this.#used[table] === 0 && this.#link[table]! >= 0 && !this.#isUnlinked(table)) {
          this.#setLink(table, false);
          unlinked.push(table);
        }
    if (!this.#quiesce()) {
      for (const table of unlinked.reverse()) this.#setLink(table, true);
      return;
    }
    for (const [table, link] of this.#link.entries())
      if (link === DEAD && this.#used[table] === 0) unlinked.push(table);
    for (const table of unlinked) this.#link[table] = FREE;
    this.#free.push(...unlinked);
  }

  #isUnlinked(table: number): boolean {
    return this.#words.load(this.#link[table]!) !== table + 1;
  }

  #at(table: number, index: number): number {
    return this.#pool + table * ENTRIES + index;
  }
}

/** Behind the last page of [page, last] whose entry is in the same leaf. */
const endOf = (page: number, last: number): number =>
  Math.min(last, page - indexOf(page, 0) + ENTRIES - 1) + 1;

/** The most tables, the root apart, that a mapping of [first, last] needs. */
function tablesOf(first: number, last: number): number {
  let tables = 0;
  for (let level = 1; level < LEVELS; level++) {
    const span = 2 ** (ENTRY_BITS * level);
    tables += Math.floor(last / span) - Math.floor(first / span) + 1;
  }
  return tables;
}
