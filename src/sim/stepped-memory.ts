import { gfnOf, type Nanoseconds } from "../base/units.ts";
import { GuestMemory, type GuestRegion } from "../memory/guest-memory.ts";
import { SharedWords } from "../memory/shared-words.ts";
import { step, type Turn } from "./turn.ts";

/** Places, beside GPAs: the words that actors share, and frames as the host's kernel and DMA know them. */
const WORDS = 2 ** 44;
const FRAMES = 2 ** 45;
export const frameAsPlace = (gfn: number): number => FRAMES + gfn;

/** Guest memory as one actor sees it: each access is a step. */
export class SteppedMemory extends GuestMemory {
  readonly #turn: Turn;
  /** Told of each range that is read or written, at that moment. */
  readonly #touched: ((gpa: number, length: number) => void) | undefined;
  /** Loads that are no steps, because nobody ever changes what they load. */
  readonly #constant: (gpa: number) => boolean;
  /** Within an access that is one step, though it is made of others. */
  #inside = false;

  constructor(
    regions: readonly GuestRegion[],
    turn: Turn,
    o: {
      readonly touched?: (gpa: number, length: number) => void;
      readonly constant?: (gpa: number) => boolean;
    } = {},
  ) {
    super(regions);
    this.#turn = turn;
    this.#touched = o.touched;
    this.#constant = o.constant ?? (() => false);
  }

  override load16(gpa: number): number {
    if (this.#turn.enter("load16", gpa)) return this.#turn.result as number;
    return this.#turn.done(super.load16(gpa));
  }
  override store16(gpa: number, value: number): void {
    if (this.#turn.enter("store16", gpa)) return;
    this.#turn.changed();
    super.store16(gpa, value);
    this.#turn.done(undefined);
  }
  override load32(gpa: number): number {
    if (this.#constant(gpa)) return super.load32(gpa);
    if (this.#turn.enter("load32", gpa)) return this.#turn.result as number;
    return this.#turn.done(super.load32(gpa));
  }
  override peek32(gpa: number): number {
    if (this.#turn.enter("peek32", gpa)) return this.#turn.result as number;
    return this.#turn.done(super.peek32(gpa));
  }
  override store32(gpa: number, value: number): void {
    if (this.#turn.enter("store32", gpa)) return;
    this.#turn.changed();
    super.store32(gpa, value);
    this.#turn.done(undefined);
  }
  override add32(gpa: number, value: number): number {
    if (this.#turn.enter("add32", gpa)) return this.#turn.result as number;
    this.#turn.changed();
    return this.#turn.done(super.add32(gpa, value));
  }
  override or32(gpa: number, bits: number): number {
    if (this.#turn.enter("or32", gpa)) return this.#turn.result as number;
    this.#turn.changed();
    return this.#turn.done(super.or32(gpa, bits));
  }
  override and32(gpa: number, bits: number): number {
    if (this.#turn.enter("and32", gpa)) return this.#turn.result as number;
    this.#turn.changed();
    return this.#turn.done(super.and32(gpa, bits));
  }
  override compareExchange32(gpa: number, expected: number, replacement: number): number {
    if (this.#turn.enter("cas32", gpa)) return this.#turn.result as number;
    const seen = super.compareExchange32(gpa, expected, replacement);
    if (seen === expected) this.#turn.changed();
    return this.#turn.done(seen);
  }

  override read(gpa: number, into: Uint8Array): void {
    const seen = this.#whole("read", gpa, () => {
      super.read(gpa, into);
      this.#touched?.(gpa, into.length);
      return into.slice();
    });
    into.set(seen);
  }
  override write(gpa: number, from: Uint8Array): void {
    this.#whole("write", gpa, () => {
      this.#turn.changed();
      super.write(gpa, from);
      this.#touched?.(gpa, from.length);
    });
  }
  override transfer(gpa: number, length: number, each: (piece: Uint8Array, done: number) => void): void {
    if (this.#inside) super.transfer(gpa, length, each);
    else
      this.#whole("transfer", gpa, () => {
        this.#turn.changed();
        super.transfer(gpa, length, each);
        this.#touched?.(gpa, length);
      });
  }

  #whole<T>(kind: string, gpa: number, access: () => T): T {
    const taken = () => {
      this.#inside = true;
      try {
        return access();
      } finally {
        this.#inside = false;
      }
    };
    return step(this.#turn, kind, taken, frameAsPlace(gfnOf(gpa)));
  }
}

/** Words that actors share, as one of them sees them. */
export class SteppedWords extends SharedWords {
  readonly #turn: Turn;
  /** As in SteppedMemory. */
  readonly #constant: (index: number) => boolean;

  constructor(buffer: SharedArrayBuffer, turn: Turn, constant: (index: number) => boolean = () => false) {
    super(buffer);
    this.#turn = turn;
    this.#constant = constant;
  }

  override load(index: number): number {
    if (this.#constant(index)) return super.load(index);
    if (this.#turn.enter("load", WORDS + index)) return this.#turn.result as number;
    return this.#turn.done(super.load(index));
  }
  override store(index: number, value: number): void {
    if (this.#turn.enter("store", WORDS + index)) return;
    this.#turn.changed();
    super.store(index, value);
    this.#turn.done(undefined);
  }
  override add(index: number, value: number): number {
    if (this.#turn.enter("add", WORDS + index)) return this.#turn.result as number;
    this.#turn.changed();
    return this.#turn.done(super.add(index, value));
  }
  override or(index: number, bits: number): number {
    if (this.#turn.enter("or", WORDS + index)) return this.#turn.result as number;
    this.#turn.changed();
    return this.#turn.done(super.or(index, bits));
  }
  override and(index: number, bits: number): number {
    if (this.#turn.enter("and", WORDS + index)) return this.#turn.result as number;
    this.#turn.changed();
    return this.#turn.done(super.and(index, bits));
  }
  /** Who waits looks again whenever something has changed. */
  override wait(index: number, value: number, timeoutMs: number): void {
    const changed = () => this.load(index) !== value;
    this.#turn.waitFor(changed, (timeoutMs * 1e6) as Nanoseconds);
  }
  override notify(): void {}
}
