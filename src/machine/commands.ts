import { type MessagePort, receiveMessageOnPort, Worker } from "node:worker_threads";
import { CoiommuError, HostError, PeerError, PeerGone, UserError } from "../base/errors.ts";

/**
 * Commands from the control thread to a worker that sleeps where no message reaches it, in poll(2) or on a bell: a
 * message, and what wakes it. The worker answers each; what it throws comes back as the command's rejection.
 */
interface Request {
  readonly id: number;
  readonly command: string;
  readonly argument: unknown;
}
type Message =
  | { readonly id: number; readonly result: unknown }
  | { readonly id: number; readonly failure: string }
  | { readonly id: number; readonly host: ConstructorParameters<typeof HostError> }
  | { readonly event: WorkerEvent };

/** What a worker tells without being asked. */
export interface WorkerEvent {
  /**
   * "peer-gone": QEMU closed its end. "warning": something failed, the VM goes on. "broken": the VM cannot go on. "log":
   * lines of an event log.
   */
  readonly kind: "peer-gone" | "warning" | "broken" | "log";
  readonly message: string;
}

/** What every worker is given, beside its own data. */
export interface WorkerBase {
  readonly port: MessagePort;
}

/** The worker's side. */
export class CommandServer {
  readonly #port: MessagePort;
  readonly #handlers: Readonly<Record<string, (argument: never) => unknown>>;

  constructor({ port }: WorkerBase, handlers: Readonly<Record<string, (argument: never) => unknown>>) {
    this.#port = port;
    this.#handlers = handlers;
  }

  /** Serve what has arrived: to be called whenever the worker is woken. */
  serve(): void {
    for (let m = receiveMessageOnPort(this.#port); m; m = receiveMessageOnPort(this.#port))
      this.#serve(m.message as Request);
  }

  tell(kind: WorkerEvent["kind"], message: string): void {
    this.#post({ event: { kind, message } });
  }

  /** The connection to QEMU is over, and why. */
  tellEnd(error: PeerError | HostError): void {
    if (error instanceof PeerGone) this.tell("peer-gone", error.message);
    else if (error instanceof PeerError) this.tell("broken", `QEMU broke the protocol: ${error.message}`);
    else this.tell("broken", `the host cannot serve QEMU any more: ${error.message}`);
  }

  #serve({ id, command, argument }: Request): void {
    try {
      this.#post({ id, result: this.#handlers[command]!(argument as never) });
    } catch (error) {
      if (!(error instanceof CoiommuError)) throw error;
      if (error instanceof HostError) this.#post({ id, host: [error.syscall, error.errno, error.detail] });
      else this.#post({ id, failure: error.message });
    }
  }

  #post(message: Message): void {
    this.#port.postMessage(message);
  }
}

/** There is no worker any more that could answer. */
export class WorkerEnded extends UserError {}

/** Wakes a worker. */
export interface Wake {
  signal(): void;
  /** When the worker has ended. */
  close(): void;
}

export interface WorkerHostOptions {
  /** As in "the backend": for sentences about its end. */
  readonly name: string;
  readonly entry: URL;
  readonly data: object;
  readonly wake: Wake;
  onEvent(event: WorkerEvent): void;
}

/** A worker has this long to end when it is told to; then it is ended. */
const STOP_LIMIT_MS = 10_000;

/** The control thread's side: owns the worker. */
export class WorkerHost {
  readonly #worker: Worker;
  readonly #wake: Wake;
  readonly #port: MessagePort;
  readonly #pending = new Map<number, PromiseWithResolvers<unknown>>();
  #nextId = 1;
  #dead: Error | undefined;
  #stopping = false;
  /** Resolves when the worker's thread has ended; with an error when it was not told to. */
  readonly ended: Promise<Error | undefined>;

  constructor({ name, entry, data, wake, onEvent }: WorkerHostOptions) {
    const { port1, port2 } = new MessageChannel();
    this.#wake = wake;
    this.#port = port1 as unknown as MessagePort;
    const hear = (message: Message) => {
      if ("event" in message) onEvent(message.event);
      else this.#settle(message);
    };
    this.#port.on("message", hear);
    this.#worker = new Worker(entry, { workerData: { ...data, port: port2 }, transferList: [port2] });
    let failure: unknown;
    this.#worker.on("error", (error) => {
      failure = error;
    });
    this.ended = new Promise((resolve) => {
      this.#worker.on("exit", () => {
        // What it said last may come after the news of its end.
        for (let m = receiveMessageOnPort(this.#port); m; m = receiveMessageOnPort(this.#port))
          hear(m.message);
        const error = new WorkerEnded(`${name} has ended${failure === undefined ? "" : because(failure)}`, 1);
        this.#die(error);
        resolve(failure !== undefined || !this.#stopping ? error : undefined);
      });
    });
  }

  request<T>(command: string, argument?: unknown): Promise<T> {
    if (this.#dead) return Promise.reject(this.#dead);
    const id = this.#nextId++;
    const pending = Promise.withResolvers<unknown>();
    this.#pending.set(id, pending);
    this.#port.postMessage({ id, command, argument } satisfies Request);
    this.#wake.signal();
    return pending.promise as Promise<T>;
  }

  /** Tell the worker to stop, and wait until its thread has ended; its answer. */
  async stop<T>(): Promise<T> {
    this.#stopping = true;
    const answer = this.request<T>("stop");
    const limit = setTimeout(() => void this.#worker.terminate(), STOP_LIMIT_MS);
    await Promise.allSettled([answer, this.ended]);
    clearTimeout(limit);
    return await answer;
  }

  /** End the thread wherever it is. */
  async terminate(): Promise<void> {
    this.#stopping = true;
    await this.#worker.terminate();
    await this.ended;
  }

  #settle(message: Exclude<Message, { event: WorkerEvent }>): void {
    const pending = this.#pending.get(message.id);
    this.#pending.delete(message.id);
    if ("host" in message) pending?.reject(new HostError(...message.host));
    else if ("failure" in message) pending?.reject(new UserError(message.failure, 1));
    else pending?.resolve(message.result);
  }

  #die(error: Error): void {
    this.#dead = error;
    for (const { reject } of this.#pending.values()) reject(error);
    this.#pending.clear();
    this.#port.close();
    this.#wake.close();
  }
}

/** A bug of ours, as one line: what, and where. */
function because(failure: unknown): string {
  if (!(failure instanceof Error)) return `: ${failure}`;
  const where = /\bat .*?([\w-]+\.[tj]s:\d+)/.exec(failure.stack ?? "")?.[1];
  return `: internal error, please report it: ${failure.message}${where === undefined ? "" : ` (${where})`}`;
}

/** The module at `path`, seen from the module at `from`, as source or as built. */
export const workerEntry = (from: string, path: string): URL =>
  new URL(`${path}${from.endsWith(".ts") ? ".ts" : ".js"}`, from);
