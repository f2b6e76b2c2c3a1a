import type { Duplex } from "node:stream";
import { UserError } from "../../base/errors.ts";
import { within } from "./deadline.ts";
import { eachLine } from "./lines.ts";

const LINE_MAX = 16 * 2 ** 20;
const ANSWER_MS_MAX = 30_000;

export interface QmpEvent {
  event: string;
  data: Record<string, unknown>;
}

/** Send `bytes` with fds at once, past what the stream buffers. */
export type SendFds = (bytes: Uint8Array, fds: readonly number[]) => void;

interface Pending {
  resolve: (value: unknown) => void;
  reject: (error: Error) => void;
}

/** QEMU's control protocol: one JSON object per line (QEMU docs/interop/qmp-spec.rst). */
export class Qmp {
  /** QEMU's version, from its greeting. */
  readonly ready: Promise<string>;
  /** Resolves when the connection is over: when QEMU has ended, for one that nobody else can close. */
  readonly closed: Promise<void>;
  readonly #stream: Duplex;
  readonly #sendFds: SendFds | undefined;
  readonly #pending = new Map<number, Pending>();
  readonly #listeners = new Set<(event: QmpEvent) => void>();
  #nextId = 1;
  #closed: Error | undefined;

  constructor(stream: Duplex, sendFds?: SendFds) {
    this.#stream = stream;
    this.#sendFds = sendFds;
    const greeting = Promise.withResolvers<string>();
    this.ready = greeting.promise.then(async (version) => {
      await this.execute("qmp_capabilities");
      return version;
    });
    this.ready.catch(() => {});
    eachLine(stream, LINE_MAX, (line) => this.#take(line, greeting.resolve));
    const closed = Promise.withResolvers<void>();
    this.closed = closed.promise;
    const lost = () => {
      closed.resolve();
      const error = new UserError("QEMU closed its control connection", 1);
      greeting.reject(error);
      this.#fail(error);
    };
    stream.on("error", lost).on("close", lost).on("end", lost);
  }

  /** Resolves with what the command returns. */
  async execute<T = unknown>(command: string, args?: Record<string, unknown>): Promise<T> {
    return await this.#ask<T>(command, args, (line) => this.#stream.write(line));
  }

  /** Give QEMU a duplicate of `fd`, under a name. Only with `sendFds`. */
  async giveFd(name: string, fd: number): Promise<void> {
    await this.#ask("getfd", { fdname: name }, (line) => this.#sendFds!(Buffer.from(line), [fd]));
  }

  async #ask<T>(
    command: string,
    args: Record<string, unknown> | undefined,
    send: (line: string) => void,
  ): Promise<T> {
    if (this.#closed) throw this.#closed;
    const id = this.#nextId++;
    const { promise, resolve, reject } = Promise.withResolvers<unknown>();
    this.#pending.set(id, { resolve, reject });
    send(`${JSON.stringify({ execute: command, arguments: args ?? {}, id })}\n`);
    const late = () => new UserError(`QEMU did not answer ${command} within ${ANSWER_MS_MAX / 1000} s`, 1);
    return (await within(promise, ANSWER_MS_MAX, late).finally(() => this.#pending.delete(id))) as T;
  }

  /** Returns what takes the listener away again. */
  onEvent(listener: (event: QmpEvent) => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** Leave QEMU alone from now on. */
  close(): void {
    this.#stream.destroy();
  }

  #take(line: string, greet: (version: string) => void): void {
    const message = parse(line);
    if (message.QMP) {
      const { major, minor, micro } = message.QMP.version.qemu;
      greet(`${major}.${minor}.${micro}`);
    } else if (message.event) {
      const event = { event: message.event, data: message.data ?? {} };
      for (const listener of this.#listeners) listener(event);
    } else if (message.id !== undefined) {
      const pending = this.#pending.get(message.id);
      if (message.error) pending?.reject(new UserError(`QEMU: ${message.error.desc}`, 1));
      else pending?.resolve(message.return);
    }
  }

  #fail(error: Error): void {
    this.#closed ??= error;
    for (const { reject } of this.#pending.values()) reject(error);
  }
}

interface Message {
  QMP?: { version: { qemu: { major: number; minor: number; micro: number } } };
  event?: string;
  data?: Record<string, unknown>;
  id?: number;
  return?: unknown;
  error?: { desc: string };
}

function parse(line: string): Message {
  try {
    return JSON.parse(Buffer.from(line, "latin1").toString("utf8")) as Message;
  } catch {
    return {};
  }
}
