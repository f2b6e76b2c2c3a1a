import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { join } from "node:path";
import { eventually } from "./eventually.ts";

const BIN = join(import.meta.dirname, "../../bin/coiommu.js");

export interface Ended {
  readonly code: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

/** `coiommu` as a person starts it. */
export class Cli {
  readonly child: ChildProcess;
  readonly ended: Promise<Ended>;
  #stdout = "";
  #stderr = "";

  constructor(args: readonly string[], through: readonly string[] = [], env: NodeJS.ProcessEnv = {}) {
    const [file, ...rest] = [...through, process.execPath, BIN, ...args];
    this.child = spawn(file!, rest, {
      stdio: ["ignore", "pipe", "pipe"],
      env: { ...process.env, ...env },
    });
    this.child.stdout!.on("data", (d) => (this.#stdout += d));
    this.child.stderr!.on("data", (d) => (this.#stderr += d));
    this.ended = new Promise((resolve) =>
      this.child.on("close", (code) => resolve({ code, stdout: this.#stdout, stderr: this.#stderr })),
    );
  }

  get pid(): number {
    return this.child.pid!;
  }

  /** What it has said so far. */
  get stderr(): string {
    return this.#stderr;
  }

  /** Wait until it says so on stderr. */
  async said(text: string): Promise<void> {
    assert.ok(
      await eventually(() => this.#stderr.includes(text), 60_000),
      `it never said "${text}": ${this.#stderr}`,
    );
  }
}

/** The last line, which must be the only one that is a complaint. */
export function complaint({ stderr }: Ended): string {
  const lines = stderr
    .trim()
    .split("\n")
    .filter((line) => line.startsWith("coiommu:") || /^\s+at /.test(line));
  assert.equal(lines.length, 1, `one sentence, but it said:\n${stderr}`);
  return lines[0]!;
}
