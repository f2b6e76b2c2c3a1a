import yoctoSpinner from "yocto-spinner";

/** Long work shows what it does: a spinner on a terminal, a line per step in a pipe. Always on stderr. */
export class Progress {
  readonly #spinner = process.stderr.isTTY ? yoctoSpinner({ stream: process.stderr }) : undefined;
  #prefix = "";
  #last = "";

  /** Put before every text: which run of several this is. */
  prefix(text: string): void {
    this.#prefix = text;
  }

  step = (text: string): void => {
    const line = this.#prefix + text;
    if (line === this.#last) return;
    this.#last = line;
    if (!this.#spinner) process.stderr.write(`${line}\n`);
    else if (this.#spinner.isSpinning) this.#spinner.text = line;
    else this.#spinner.start(line);
  };

  warn = (text: string): void => this.note(`coiommu: warning: ${text}`);

  /** A line that stays. */
  note = (line: string): void => {
    const spinning = this.#spinner?.isSpinning;
    this.#spinner?.stop();
    process.stderr.write(`${line}\n`);
    if (spinning) this.#spinner?.start(this.#last);
  };

  stop(): void {
    this.#spinner?.stop();
  }
}
