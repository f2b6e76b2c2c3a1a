import fs from "node:fs";
import { HostError } from "../base/errors.ts";

/** One number of /proc/self/status, which the kernel makes anew for each read. Costs no allocation. */
export class StatusField {
  readonly #name: string;
  readonly #label: Buffer;
  readonly #page = Buffer.alloc(4096);
  #fd: number | undefined;

  /** `name` as in the file: "VmPin", "VmLck". */
  constructor(name: string) {
    this.#name = name;
    this.#label = Buffer.from(`\n${name}:`);
  }

  /** The decimal number behind the name, in its unit there (kB for the Vm fields). */
  read(): number {
    this.#fd ??= fs.openSync("/proc/self/status", "r");
    const length = fs.readSync(this.#fd, this.#page, 0, this.#page.length, 0);
    let at = this.#page.indexOf(this.#label);
    if (at < 0 || at >= length)
      throw new HostError("read", "ENOENT", `no ${this.#name} in /proc/self/status`);
    at += this.#label.length;
    while (this.#page[at] === 0x20 || this.#page[at] === 0x09) at++;
    let value = 0;
    for (; at < length && isDigit(this.#page[at]!); at++) value = value * 10 + this.#page[at]! - 0x30;
    return value;
  }

  close(): void {
    if (this.#fd !== undefined) fs.closeSync(this.#fd);
    this.#fd = undefined;
  }
}

const isDigit = (byte: number) => byte >= 0x30 && byte <= 0x39;
