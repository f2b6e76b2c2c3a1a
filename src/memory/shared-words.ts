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
  /** Block until `index` is notified or no longer holds `value`, or the time is over. Not on the main thread. */
  wait(index: number, value: number, timeoutMs: number): "ok" | "not-equal" | "timed-out" {
    return Atomics.wait(this.#words, index, value, timeoutMs);
  }
  notify(index: number): void {
    Atomics.notify(this.#words, index);
  }
}
