import type { Bell } from "../../memory/bell.ts";
import { SharedWords } from "../../memory/shared-words.ts";

/** Registers that a guest's driver and a device in another thread share; what counts is the latest value. */
export const doorbellsBuffer = (registers: number): SharedArrayBuffer => new SharedArrayBuffer(4 * registers);

/** The driver's side. */
export class Doorbells {
  readonly #words: SharedWords;
  readonly #bell: Bell;

  constructor(buffer: SharedArrayBuffer, bell: Bell) {
    this.#words = new SharedWords(buffer);
    this.#bell = bell;
  }

  /** ORDERING: sequentially consistent; what was written to memory before is seen by the device that sees this. */
  write(register: number, value: number): void {
    this.#words.store(register, value);
    this.#bell.ring();
  }

  /** Of a register that the device writes. */
  read(register: number): number {
    return this.#words.load(register);
  }
}

/** The device's side. */
export class DeviceRegisters {
  readonly #words: SharedWords;
  readonly #seen: Int32Array;

  constructor(buffer: SharedArrayBuffer) {
    this.#words = new SharedWords(buffer);
    this.#seen = new Int32Array(this.#words.length);
  }

  /** Of a register that the driver only reads. */
  set(register: number, value: number): void {
    this.#seen[register] = value;
    this.#words.store(register, value);
  }

  /** Call `each` for every register that was written since the last call. */
  changed(each: (register: number, value: number) => void): void {
    for (let register = 0; register < this.#seen.length; register++) {
      const value = this.#words.load(register);
      if (value === this.#seen[register]) continue;
      this.#seen[register] = value;
      each(register, value);
    }
  }
}
