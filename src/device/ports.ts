/** What a device model needs of the host; src/host implements it, tests do with plain objects. */

export interface MessageSocket {
  readonly fd: number;
  /** Waits for exactly `size` bytes, valid until the next receive, and the fds with them. Throws PeerGone. */
  receive(size: number): { readonly bytes: Uint8Array; readonly fds: readonly number[] };
  /** Throws PeerGone. */
  send(bytes: Uint8Array): void;
  close(): void;
}

export interface EventLoop {
  /** Call `handler` whenever `fd` is readable or hung up, until unwatch(). */
  watch(fd: number, handler: () => void): void;
  unwatch(fd: number): void;
}

/** Maps the guest's RAM. */
export interface RamMapper {
  /** Takes over `fd`. Throws ProtocolError for a range beyond the file. */
  map(fd: number, offset: number, size: number): { readonly hostAddress: number; readonly bytes: Uint8Array };
  /** Afterwards every view made by map() is empty. */
  close(): void;
}

/** File descriptors that a peer sent: eventfds, mostly. */
export interface PeerFds {
  signal(fd: number): void;
  drain(fd: number): void;
  close(fd: number): void;
}

export interface DevicePorts {
  readonly socket: MessageSocket;
  readonly loop: EventLoop;
  readonly mapper: RamMapper;
  readonly fds: PeerFds;
  /** Told before the device begins to do DMA, and when it cannot any more. */
  mastering(on: boolean): void;
}
