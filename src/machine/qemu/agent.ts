import type { Duplex } from "node:stream";
import { gunzipSync } from "node:zlib";
import { UserError } from "../../base/errors.ts";
import { every, within } from "./deadline.ts";
import { eachLine } from "./lines.ts";

const LINE_MAX = 64 * 2 ** 20;
/** Above what any workload prints; a guest could send a small line that unpacks to gigabytes. */
const OUTPUT_MAX = 256 * 2 ** 20;
/**
 * About one command in a thousand stays in the emulated UART, its interrupt lost, until another byte comes (QEMU
 * 7.2, Linux 6.1). An empty line, while an answer is due, is that byte.
 */
const NUDGE_MS = 500;
const HELLO = /coiommu-agent 1 (\S+)$/;
const ANSWER = /^(\d+) (\d+) ([A-Za-z0-9+/=]*)$/;

export interface CommandResult {
  code: number;
  /** Standard output and standard error, as they came. */
  output: string;
}

export interface RunOptions {
  timeoutMs: number;
  /** Named when it fails or hangs: "fio", "loading the module". */
  what: string;
}

interface Pending {
  what: string;
  resolve: (result: CommandResult) => void;
  reject: (error: Error) => void;
}

/** Asks guest/agent/init for commands. Any number may be under way at once. */
export class GuestAgent {
  readonly #stream: Duplex;
  readonly #lastConsoleLine: () => string;
  readonly #pending = new Map<number, Pending>();
  readonly #hello = Promise.withResolvers<string>();
  #nextId = 1;
  #failure: Error | undefined;

  constructor(stream: Duplex, lastConsoleLine: () => string) {
    this.#stream = stream;
    this.#lastConsoleLine = lastConsoleLine;
    this.#hello.promise.catch(() => {});
    eachLine(stream, LINE_MAX, (line) => this.#take(line));
    stream.on("error", () => {}); // the end of QEMU is told by fail()
  }

  /** The release of the guest's kernel, when its user space has started. */
  async hello(timeoutMs: number): Promise<string> {
    const late = () => this.#hung("the guest did not reach user space", timeoutMs);
    return await within(this.#hello.promise, timeoutMs, late);
  }

  /** Run a shell script in the guest. Resolves when it ends, whatever its exit code. */
  run(script: string, options: RunOptions): Promise<CommandResult> {
    return this.#ask(this.#nextId++, Buffer.from(script).toString("base64"), options);
  }

  /** Have the guest write a number into its kernel's trace, without any process for it; resolves with the number. */
  async mark(timeoutMs: number): Promise<number> {
    const id = this.#nextId++;
    const { code } = await this.#ask(id, "!", { timeoutMs, what: "marking the guest's trace" });
    if (code !== 0) throw new UserError("the guest's trace takes no marks", 1);
    return id;
  }

  async #ask(id: number, request: string, { timeoutMs, what }: RunOptions): Promise<CommandResult> {
    if (this.#failure) throw this.#failure;
    const { promise, resolve, reject } = Promise.withResolvers<CommandResult>();
    this.#pending.set(id, { what, resolve, reject });
    this.#stream.write(`\n${id} ${request}\n`);
    const late = () => this.#hung(`${what} did not end in the guest`, timeoutMs);
    const stopNudging = every(NUDGE_MS, () => this.#stream.write("\n"));
    try {
      return await within(promise, timeoutMs, late);
    } finally {
      stopNudging();
      this.#pending.delete(id);
    }
  }

  /** No answer will come any more: everything under way, and everything asked later, fails with `error`. */
  fail(reason: string): void {
    const error = (doing: string) => new UserError(`${reason} ${doing}${this.#console()}`, 1);
    this.#failure ??= error("before this command");
    this.#hello.reject(error("before the guest reached user space"));
    for (const { what, reject } of this.#pending.values()) reject(error(`during ${what}`));
  }

  #hung(what: string, timeoutMs: number): UserError {
    return new UserError(`${what} within ${timeoutMs / 1000} s${this.#console()}`, 1);
  }

  #console(): string {
    const line = this.#lastConsoleLine();
    return line === "" ? "; its console said nothing" : `; last console line: ${line}`;
  }

  #take(line: string): void {
    const hello = HELLO.exec(line);
    if (hello) this.#hello.resolve(hello[1]!);
    const answer = ANSWER.exec(line);
    const pending = answer && this.#pending.get(Number(answer[1]));
    if (!pending) return;
    try {
      const output = gunzipSync(Buffer.from(answer[3]!, "base64"), {
        maxOutputLength: OUTPUT_MAX,
      }).toString();
      pending.resolve({ code: Number(answer[2]), output });
    } catch {
      pending.reject(new UserError(`the guest's answer about ${pending.what} arrived damaged`, 1));
    }
  }
}
