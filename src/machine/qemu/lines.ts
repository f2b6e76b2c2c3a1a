import type { Readable } from "node:stream";

/** Call `take` with every complete line. A peer that never ends its line is cut at `lengthMax`, and the line lost. */
export function eachLine(stream: Readable, lengthMax: number, take: (line: string) => void): void {
  let parts: string[] = [];
  let length = 0;
  let lost = false;
  stream.on("data", (chunk: Buffer) => {
    const pieces = chunk.toString("latin1").split("\n");
    pieces.forEach((piece, i) => {
      length += piece.length;
      if (length > lengthMax) lost = true;
      if (lost) parts = [];
      else parts.push(piece);
      if (i === pieces.length - 1) return;
      if (!lost) take(parts.join("").replace(/\r$/, ""));
      parts = [];
      length = 0;
      lost = false;
    });
  });
}

/** The last `limit` characters of what was written. */
export class Tail {
  readonly #limit: number;
  #text = "";

  constructor(limit: number) {
    this.#limit = limit;
  }

  append(text: string): void {
    this.#text = (this.#text + text).slice(-this.#limit);
  }

  get text(): string {
    return this.#text;
  }

  lastLine(): string {
    return this.#text.trimEnd().split("\n").at(-1)?.trim() ?? "";
  }
}
