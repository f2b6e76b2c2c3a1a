import { HostError, InvariantViolation, invariant } from "../base/errors.ts";
import { lastErrno, libc } from "./libc.ts";

const POLLIN = 0x001;
const POLLNVAL = 0x020;
const RETURNED_SHIFT = 16;

type Handler = () => void;

/**
 * poll(2) over a set of fds. A handler may watch and unwatch while it runs: one that was unwatched in the same turn
 * is not called any more, one that was added is called from the next turn on. What a handler throws leaves run().
 */
export class Reactor {
  readonly #handlers = new Map<number, Handler>();
  /** struct pollfd[]: i32 fd, i16 events, i16 revents; little-endian, hence two words each. */
  #poll = new Int32Array(0);
  /** Of the fds in #poll, in that order. */
  #polled: Handler[] = [];
  #changed = false;
  #running = false;

  watch(fd: number, handler: Handler): void {
    invariant(!this.#handlers.has(fd), `fd ${fd} is watched twice`);
    this.#handlers.set(fd, handler);
    this.#changed = true;
  }

  /** To be called before the fd is closed. Unknown fds are ignored. */
  unwatch(fd: number): void {
    if (this.#handlers.delete(fd)) this.#changed = true;
  }

  /** Number of watched fds. */
  get size(): number {
    return this.#handlers.size;
  }

  /**
   * Not from within a handler: the inner run would take the answers of the outer one.
   *
   * Wait at most `timeoutMs` (0: not at all, negative: for ever) and call the handlers of the fds that are
   * readable, hung up or in error. Returns how many; 0 also when a signal came in between.
   */
  run(timeoutMs: number): number {
    invariant(!this.#running, "a handler runs the reactor that called it");
    this.#running = true;
    try {
      return this.#turn(timeoutMs);
    } finally {
      this.#running = false;
    }
  }

  #turn(timeoutMs: number): number {
    if (this.#changed) this.#rebuild();
    const poll = this.#poll;
    const polled = this.#polled;
    // SAFETY: `poll` has two words per fd and is referenced here during the call.
    let ready = libc.poll(poll, polled.length, Math.ceil(timeoutMs));
    if (ready < 0) {
      if (lastErrno() === "EINTR") return 0;
      throw new HostError("poll", lastErrno());
    }
    let called = 0;
    for (let i = 0; ready > 0; i++) {
      const returned = poll[2 * i + 1]! >>> RETURNED_SHIFT;
      if (returned === 0) continue;
      ready--;
      const fd = poll[2 * i]!;
      const handler = polled[i]!;
      if (this.#handlers.get(fd) !== handler) continue;
      if (returned & POLLNVAL) throw new InvariantViolation(`fd ${fd} was closed while it was watched`);
      handler();
      called++;
    }
    return called;
  }

  #rebuild(): void {
    this.#poll = new Int32Array(new ArrayBuffer(8 * this.#handlers.size));
    this.#polled = [...this.#handlers.values()];
    for (const [i, fd] of [...this.#handlers.keys()].entries()) {
      this.#poll[2 * i] = fd;
      this.#poll[2 * i + 1] = POLLIN;
    }
    this.#changed = false;
  }
}
