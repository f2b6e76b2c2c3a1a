/**
 * What docs/abi.md and ADR 4 say about pins, as plain sets and numbers: nothing here is taken from src/. Frames of
 * guest RAM come in blocks, of which the VMM's memory map may hide some or put other memory behind them.
 */
const [COUNT, D, A, P] = [0xffff, 0x1000_0000, 0x4000_0000, 0x8000_0000];
const has = (word: number, bit: number) => (word & bit) !== 0;

export interface Block {
  readonly first: number;
  readonly frames: number;
}
export interface Range {
  readonly gfn: number;
  readonly nrFrames: number;
}
export type Status = "OK" | "IOERR" | "UNSUPP" | "INVAL" | "RANGE" | "NOENT" | "FAULT" | "NOMEM";

export class HostModel {
  readonly quota: number;
  readonly bios: boolean;
  readonly blocks: readonly Block[];
  /** Which memory is behind each block; undefined: none. */
  readonly backing: (number | undefined)[];
  /** Frame -> the activation that last claimed it; 0: none did. */
  readonly pins = new Map<number, number>();
  /** Pages of frames that are gone, which the host did not let go of. */
  orphans = 0;
  /** Units of the table. Those of the first 1,024 frames exist; the others once a leaf is there. */
  readonly words = new Map<number, number>();
  secondLeaf = false;

  pinPage = false;
  on = false;
  undecided = true;
  complete = false;
  activations = 0;
  parks = 0;

  /** The host: how many pages it pins in all, how it refuses more, and whether it releases any. */
  pagesMax = Number.POSITIVE_INFINITY;
  errno = "ENOMEM";
  releases = true;
  /** A device keeps a DMA window open. */
  window = false;

  constructor(quota: number, bios: boolean, blocks: readonly Block[]) {
    this.quota = quota;
    this.bios = bios;
    this.blocks = blocks;
    this.backing = blocks.map(() => undefined);
  }

  get pages(): number {
    return this.pins.size + this.orphans;
  }

  isRam(gfn: number): boolean {
    return this.blocks.some(
      (b, i) => this.backing[i] !== undefined && gfn >= b.first && gfn < b.first + b.frames,
    );
  }

  get ramFrames(): number {
    return this.blocks.reduce((sum, b, i) => sum + (this.backing[i] === undefined ? 0 : b.frames), 0);
  }

  /** The unit's word; undefined: the table has no unit for it. */
  word(gfn: number): number | undefined {
    return gfn < 1024 || (this.secondLeaf && gfn < 2048) ? (this.words.get(gfn) ?? 0) : undefined;
  }

  /** The guest or the host changes a unit, which exists. */
  setWord(gfn: number, word: number): void {
    this.words.set(gfn, word >>> 0);
  }

  // --- requests ------------------------------------------------------------------------------------------------------

  /** abi.md section 3, "PIN request", of a request whose sizes add up. Changes what a request of that outcome does. */
  pin(ranges: readonly Range[]): Status {
    if (!this.pinPage || !this.on) return "UNSUPP";
    // ADR 4.2.
    if (ranges.reduce((sum, r) => sum + r.nrFrames, 0) > this.ramFrames) return "RANGE";
    const gfns = ranges.flatMap((r) => Array.from({ length: r.nrFrames }, (_, i) => r.gfn + i));
    for (const gfn of gfns) {
      // ADR 4.3.
      if (!this.isRam(gfn)) return "RANGE";
      if (this.word(gfn) === undefined) return "FAULT";
    }
    const status = this.#pinFresh(new Set(gfns));
    if (status !== "OK") return status;
    for (const gfn of gfns) {
      this.pins.set(gfn, this.activations);
      this.setWord(gfn, this.word(gfn)! | P);
    }
    return "OK";
  }

  #pinFresh(wanted: ReadonlySet<number>): Status {
    for (let attempt = 0; ; attempt++) {
      const fresh = [...wanted].filter((gfn) => !this.pins.has(gfn)).length;
      const fits = fresh === 0 || this.pages + fresh <= this.quota;
      const pinned = fresh === 0 || this.pages + fresh <= this.pagesMax;
      if (fits && pinned) return "OK";
      if (fits && this.errno !== "ENOMEM") return "IOERR";
      const before = this.pages;
      // "NOMEM: the quota would be passed, also after an unpin pass that the device must try first"; ADR 4.4: two.
      if (attempt === 0) {
        this.#releaseOrphans();
        for (let i = 0; i < 2; i++) this.pass();
      }
      if (this.pages === before) return fits ? "IOERR" : "NOMEM";
    }
  }

  // --- unpin ---------------------------------------------------------------------------------------------------------

  get #letsGo(): boolean {
    return this.releases && !this.window;
  }

  /** A whole unpin pass. abi.md section 2, "Host unpin" and "Host ageing"; section 4, the last paragraph. */
  pass(): void {
    this.#releaseOrphans();
    if (!this.on || this.parks > 0) return;
    for (const [gfn, activation] of [...this.pins]) {
      const ours = activation === this.activations;
      // "PIN on without COMPLETE: pin on request, but unpin only frames that this table once claimed."
      if (!ours && !this.complete) continue;
      const word = this.word(gfn);
      // ADR 4.5: without P and COUNT, a frame goes if this table never claimed it.
      if (word === undefined || !has(word, P)) {
        if (!ours && !has(word ?? 0, COUNT) && this.#letsGo) this.pins.delete(gfn);
        continue;
      }
      if (word !== P && word !== P + D) {
        this.setWord(gfn, word & ~A);
        continue;
      }
      // "If the release fails, set P again": of a frame that this table was told is pinned.
      if (this.#letsGo || !ours) this.setWord(gfn, word & ~P);
      if (this.#letsGo) this.pins.delete(gfn);
    }
  }

  #releaseOrphans(): void {
    if (this.#letsGo) this.orphans = 0;
  }

  // --- the guest's life ------------------------------------------------------------------------------------------------

  activate(complete: boolean): void {
    Object.assign(this, { on: true, undecided: false, complete, parks: 0 });
    this.activations++;
  }

  deactivate(): void {
    this.on = false;
  }

  machineReset(): void {
    Object.assign(this, { on: false, pinPage: false, undecided: true });
    this.#drop([...this.pins.keys()]);
    this.#pinFirmwareWindow();
  }

  /** ADR 4.7: a frame whose memory leaves the map goes at once. */
  setBacking(backing: readonly (number | undefined)[]): void {
    const lost = this.blocks.filter(
      (_, i) => this.backing[i] !== undefined && this.backing[i] !== backing[i],
    );
    const gfns = [...this.pins.keys()].filter((gfn) =>
      lost.some((b) => gfn >= b.first && gfn < b.first + b.frames),
    );
    if (this.on)
      for (const gfn of gfns) {
        const word = this.word(gfn);
        if (word !== undefined) this.setWord(gfn, word & ~P);
      }
    backing.forEach((memory, i) => {
      this.backing[i] = memory;
    });
    this.#drop(gfns);
    this.#pinFirmwareWindow();
  }

  #drop(gfns: readonly number[]): void {
    for (const gfn of gfns) this.pins.delete(gfn);
    this.orphans += gfns.length;
    this.#releaseOrphans();
  }

  /** abi.md section 4: "with `bios`: the low 1 MiB", as far as the quota goes; nothing when the host refuses. */
  #pinFirmwareWindow(): void {
    if (!this.bios || !this.undecided) return;
    const missing = Array.from({ length: 256 }, (_, gfn) => gfn)
      .filter((g) => this.isRam(g) && !this.pins.has(g))
      .slice(0, Math.max(0, this.quota - this.pages));
    if (this.pages + missing.length <= this.pagesMax) for (const gfn of missing) this.pins.set(gfn, 0);
  }

  /** A device touches a frame before there is a driver. Returns whether it may. Room is made for it as for a PIN. */
  touch(gfn: number): boolean {
    if (this.pins.has(gfn)) return true;
    const granted = this.undecided && this.bios && this.isRam(gfn);
    if (!granted || this.#pinFresh(new Set([gfn])) !== "OK") return false;
    this.pins.set(gfn, 0);
    return true;
  }
}
