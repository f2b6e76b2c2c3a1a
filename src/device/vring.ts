import { ProtocolError } from "../base/errors.ts";
import type { GuestAccess } from "../memory/guest-memory.ts";
import { type QueueLayout, SplitQueue } from "../virtio/queue.ts";
import type { EventLoop, PeerFds } from "./ports.ts";
import { type ChainHandler, type QueueCounters, QueueRunner } from "./queue-runner.ts";

export interface VringPorts {
  readonly loop: EventLoop;
  readonly fds: PeerFds;
  readonly memory: GuestAccess;
  readonly handle: ChainHandler;
  readonly counters: QueueCounters;
  /** Told when the ring may be kicked from now on, or was stopped. */
  running(on: boolean): void;
}

/**
 * One ring of a vhost-user back-end: its settings, its eventfds, its state (vhost-user.rst "Ring states"): stopped
 * until the first kick, served while started and enabled, stopped by GET_VRING_BASE.
 */
export class Vring {
  readonly #p: VringPorts;
  #size = 0;
  #base = 0;
  #layout: QueueLayout | undefined;
  #enabled = false;
  #started = false;
  #runner: QueueRunner | undefined;
  #kick: number | undefined;
  #call: number | undefined;
  #err: number | undefined;

  constructor(ports: VringPorts) {
    this.#p = ports;
  }

  get size(): number {
    return this.#size;
  }

  /** Throws ProtocolError while the ring runs, as the other settings do. */
  setSize(size: number): void {
    this.#settable();
    if (size === 0 || size > 32768 || size & (size - 1)) throw new ProtocolError(`ring of ${size} entries`);
    this.#size = size;
    this.#layout = undefined;
  }

  setBase(base: number): void {
    this.#settable();
    if (base > 0xffff) throw new ProtocolError(`ring base ${base}`);
    this.#base = base;
  }

  setLayout(layout: QueueLayout): void {
    this.#settable();
    new SplitQueue(this.#p.memory, layout); // throws what is wrong with it
    this.#layout = layout;
  }

  /** Takes over `fd`, as the two below do; undefined: there is none. */
  setKick(fd: number | undefined): void {
    const ran = this.#kick !== undefined;
    if (ran) this.#p.loop.unwatch(this.#kick!);
    this.#close(this.#kick);
    this.#kick = fd;
    if (fd !== undefined) this.#p.loop.watch(fd, () => this.#kicked(fd));
    if (ran !== (fd !== undefined)) this.#p.running(!ran);
  }

  setCall(fd: number | undefined): void {
    this.#close(this.#call);
    this.#call = fd;
  }

  setErr(fd: number | undefined): void {
    this.#close(this.#err);
    this.#err = fd;
  }

  /** A ring that was kicked while it was disabled is served now. */
  enable(on: boolean): void {
    this.#enabled = on;
    this.#serve();
  }

  /** Returns the index of the next entry to serve. */
  stop(): number {
    this.setKick(undefined);
    this.#base = this.#runner?.base ?? this.#base;
    this.#runner = undefined;
    this.#started = false;
    return this.#base;
  }

  close(): void {
    this.stop();
    this.setCall(undefined);
    this.setErr(undefined);
  }

  #settable(): void {
    if (this.#started) throw new ProtocolError("the ring is running");
  }

  #kicked(fd: number): void {
    this.#p.fds.drain(fd);
    this.#started = true;
    this.#serve();
  }

  #serve(): void {
    if (!this.#started || !this.#enabled) return;
    this.#runner ??= this.#start();
    if (!this.#runner || this.#runner.broken) return;
    const { interrupt, more } = this.#runner.run(this.#size);
    if (interrupt && this.#call !== undefined) this.#p.fds.signal(this.#call);
    // Let the other fds have their turn before this ring goes on.
    if (more && this.#kick !== undefined) this.#p.fds.signal(this.#kick);
    if (this.#runner.broken && this.#err !== undefined) this.#p.fds.signal(this.#err);
  }

  #start(): QueueRunner | undefined {
    if (!this.#layout) {
      this.#p.counters.errors++;
      return undefined;
    }
    const options = { next: this.#base };
    const queue = new SplitQueue(this.#p.memory, this.#layout, options);
    return new QueueRunner(queue, this.#p.handle, this.#p.counters);
  }

  #close(fd: number | undefined): void {
    if (fd !== undefined) this.#p.fds.close(fd);
  }
}
