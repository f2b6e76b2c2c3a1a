import fs from "node:fs";
import { type Errno, HostError, UserError } from "../base/errors.ts";
import { LOG_FORMAT, type LogHeader } from "../wire/event-log.ts";

/** The file of `--record`: what threads and guests hand on, in the order in which it comes. */
export class Recording {
  /** When it began, by the monotonic clock. */
  readonly began: number;
  readonly #file: string;
  readonly #fd: number;
  readonly #warn: (text: string) => void;
  #failed = false;
  /** Lines that came before the header; undefined when that is written. */
  #early: string[] | undefined = [];

  /** Throws UserError for a file that cannot be written. */
  constructor(file: string, began: number, warn: (text: string) => void) {
    this.#file = file;
    this.began = began;
    this.#warn = warn;
    try {
      this.#fd = fs.openSync(file, "w");
    } catch (error) {
      throw new UserError(`--record ${file}: ${(error as Error).message}`);
    }
  }

  /** The first line of the file, whenever it comes: the backend pins before the machine is known as a whole. */
  head(header: Omit<LogHeader, "format">): void {
    const early = this.#early ?? [];
    this.#early = undefined;
    this.write(`${JSON.stringify({ format: LOG_FORMAT, ...header })}\n`);
    for (const lines of early) this.write(lines);
  }

  /** A disk that is full ends the recording, not the run. */
  write(lines: string): void {
    if (this.#failed) return;
    if (this.#early) {
      this.#early.push(lines);
      return;
    }
    try {
      fs.writeFileSync(this.#fd, lines);
    } catch (error) {
      this.#failed = true;
      const { message } = new HostError("write", (error as { code: Errno }).code, this.#file);
      this.#warn(`the recording ends here: ${message}`);
    }
  }

  close(): void {
    fs.closeSync(this.#fd);
  }
}
