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

interface Pending {
  resolve: (value: unknown) => void;
  reject: (error: Error) => void;
}

/** QEMU's control protocol: one JSON object per line (QEMU docs/interop/qmp-spec.rst). */
export class Qmp {
  /** QEMU's version, from its greeting. */
  readonly ready: Promise<string>;
  readonly #stream: Duplex;
  readonly #pending = new Map<number, Pending>();
  readonly #listeners = new Set<(event: QmpEvent) => void>();
  #nextId = 1;
  #closed: Error | undefined;

  constructor(stream: Duplex) {
    this.#stream = stream;
    const greeting = Promise.withResolvers<string>();
    this.ready = greeting.promise.then(async (version) => {
      await this.execute("qmp_capabilities");
      return version;
    });
    this.ready.catch(() => {});
    eachLine(stream, LINE_MAX, (line) => this.#take(line, greeting.resolve));
    const lost = () => {
      const error = new UserError("QEMU closed its control connection", 1);
      greeting.reject(error);
      this.#fail(error);
    };
    stream.on("error", lost).on("close", lost).on("end", lost);
  }

  /** Resolves with what the command returns. */
  async execute(command: string, args?: Record<string, unknown>): Promise<unknown> {
    if (this.#closed) throw this.#closed;
    const id = this.#nextId++;
    const { promise, resolve, reject } = Promise.withResolvers<unknown>();
    this.#pending.set(id, { resolve, reject });
    this.#stream.write(`${JSON.stringify({ execute: command, arguments: args ?? {}, id })}\n`);
    const late = () => new UserError(`QEMU did not answer ${command} within ${ANSWER_MS_MAX / 1000} s`, 1);
    return await within(promise, ANSWER_MS_MAX, late).finally(() => this.#pending.delete(id));
  }

  /** Returns what takes the listener away again. */
  onEvent(listener: (event: QmpEvent) => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
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
