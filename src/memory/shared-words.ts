/** 32-bit words that threads of this process share. Every operation is sequentially consistent. */
export class SharedWords {
  readonly #words: Int32Array;

  constructor(buffer: SharedArrayBuffer, byteOffset = 0, length = (buffer.byteLength - byteOffset) >> 2) {
    this.#words = new Int32Array(buffer, byteOffset, length);
  }

  get length(): number {
    return this.#words.length;
  }
  load(index: number): number {
    return Atomics.load(this.#words, index);
  }
  store(index: number, value: number): void {
    Atomics.store(this.#words, index, value);
  }
  add(index: number, value: number): number {
    return Atomics.add(this.#words, index, value);
  }
  or(index: number, bits: number): number {
    return Atomics.or(this.#words, index, bits);
  }
  and(index: number, bits: number): number {
    return Atomics.and(this.#words, index, bits);
  }
  /**
   * Block until `index` no longer holds `value`, or the time since it was last notified is over. Not on the main thread.
   *
   * Whoever changes a word notifies after that: somebody may have seen the change, and wait for the next one by then.
   */
  wait(index: number, value: number, timeoutMs: number): void {
    while (Atomics.wait(this.#words, index, value, timeoutMs) === "ok" && this.load(index) === value);
  }
  notify(index: number): void {
    Atomics.notify(this.#words, index);
  }
}
