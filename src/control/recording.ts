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
  #headed = false;

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

  /** Before the first lines. */
  head(header: Omit<LogHeader, "format">): void {
    this.#headed = true;
    this.write(`${JSON.stringify({ format: LOG_FORMAT, ...header })}\n`);
  }

  /** A disk that is full ends the recording, not the run. */
  write(lines: string): void {
    if (this.#failed || !this.#headed) return;
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
