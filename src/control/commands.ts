import { type MessagePort, receiveMessageOnPort, Worker } from "node:worker_threads";
import { HostError, PeerError, PeerGone, UserError } from "../base/errors.ts";
import { drainFd, EventFd } from "../host/eventfd.ts";
import type { Reactor } from "../host/reactor.ts";

/**
 * Commands from the control thread to a worker that lives in poll(2): a message, and an eventfd that wakes it. The
 * worker answers each; what it throws comes back as the command's rejection.
 */
interface Request {
  readonly id: number;
  readonly command: string;
}
interface Failure {
  readonly message: string;
  /** Of a HostError. */
  readonly errno?: string;
}
type Message =
  | { readonly id: number; readonly result: unknown }
  | { readonly id: number; readonly failure: Failure }
  | { readonly event: WorkerEvent };

/** What a worker tells without being asked. */
export interface WorkerEvent {
  /** "peer-gone": QEMU closed its end. "warning": something failed, the VM goes on. "broken": the VM cannot go on. */
  readonly kind: "peer-gone" | "warning" | "broken";
  readonly message: string;
}

/** What every worker is given, beside its own data. */
export interface WorkerBase {
  readonly wakeFd: number;
  readonly port: MessagePort;
}

/** The worker's side. */
export class CommandServer {
  readonly #port: MessagePort;

  constructor(base: WorkerBase, reactor: Reactor, handlers: Record<string, () => unknown>) {
    this.#port = base.port;
    reactor.watch(base.wakeFd, () => {
      drainFd(base.wakeFd);
      for (let m = receiveMessageOnPort(base.port); m; m = receiveMessageOnPort(base.port))
        this.#serve(m.message as Request, handlers);
    });
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

  #serve({ id, command }: Request, handlers: Record<string, () => unknown>): void {
    try {
      this.#post({ id, result: handlers[command]!() });
    } catch (error) {
      if (!(error instanceof HostError || error instanceof UserError)) throw error;
      const errno = error instanceof HostError ? { errno: error.errno } : {};
      this.#post({ id, failure: { message: error.message, ...errno } });
    }
  }

  #post(message: Message): void {
    this.#port.postMessage(message);
  }
}

/** The control thread's side: owns the worker. */
export class WorkerHost {
  readonly #worker: Worker;
  readonly #wake = EventFd.create();
  readonly #port: MessagePort;
  readonly #pending = new Map<number, PromiseWithResolvers<unknown>>();
  #nextId = 1;
  #dead: Error | undefined;
  /** Resolves when the worker's thread has ended; with its error when it did not end in order. */
  readonly ended: Promise<Error | undefined>;

  constructor(entry: URL, data: object, onEvent: (event: WorkerEvent) => void) {
    const { port1, port2 } = new MessageChannel();
    this.#port = port1 as unknown as MessagePort;
    const hear = (message: Message) => {
      if ("event" in message) onEvent(message.event);
      else this.#settle(message);
    };
    this.#port.on("message", hear);
    this.#worker = new Worker(entry, {
      workerData: { ...data, wakeFd: this.#wake.fd, port: port2 },
      transferList: [port2],
    });
    let failure: Error | undefined;
    this.#worker.on("error", (error) => {
      failure = error as Error;
    });
    this.ended = new Promise((resolve) => {
      this.#worker.on("exit", () => {
        // What it said last may come after the news of its end.
        for (let m = receiveMessageOnPort(this.#port); m; m = receiveMessageOnPort(this.#port))
          hear(m.message);
        this.#die(failure ?? new Error("the worker has ended"));
        resolve(failure);
      });
    });
  }

  get wake(): EventFd {
    return this.#wake;
  }

  request<T>(command: string): Promise<T> {
    if (this.#dead) return Promise.reject(this.#dead);
    const id = this.#nextId++;
    const pending = Promise.withResolvers<unknown>();
    this.#pending.set(id, pending);
    this.#port.postMessage({ id, command } satisfies Request);
    this.#wake.signal();
    return pending.promise as Promise<T>;
  }

  #settle(message: Exclude<Message, { event: WorkerEvent }>): void {
    const pending = this.#pending.get(message.id);
    this.#pending.delete(message.id);
    if ("failure" in message) pending?.reject(new UserError(message.failure.message, 1));
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
