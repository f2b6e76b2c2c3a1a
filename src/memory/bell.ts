import { SharedWords } from "./shared-words.ts";

/** Wakes one thread of this process: it sleeps only if nobody has rung since it began to look for work. */
export class Bell {
  readonly #words: SharedWords;

  static buffer(): SharedArrayBuffer {
    return new SharedArrayBuffer(4);
  }

  /** `buffer`: from Bell.buffer(), the same for all who ring. */
  constructor(buffer: SharedArrayBuffer) {
    this.#words = new SharedWords(buffer);
  }

  ring(): void {
    this.#words.add(0, 1);
    this.#words.notify(0);
  }

  /** Read before looking for work, for sleep(). */
  get rings(): number {
    return this.#words.load(0);
  }

  /** Sleep until it rings, unless it has since `rings` was read, or the time is over. Not on the main thread. */
  sleep(rings: number, timeoutMs: number): void {
    this.#words.wait(0, rings, timeoutMs);
  }
}
