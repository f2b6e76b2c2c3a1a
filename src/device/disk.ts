import { HostError, PeerError, PeerGone } from "../base/errors.ts";
import { type DmaGate, GatedMemory } from "../memory/gated-memory.ts";
import { GuestMemory } from "../memory/guest-memory.ts";
import { BlockDevice } from "./block.ts";
import type { BlockStore } from "./block-store.ts";
import type { DeviceCounters } from "./counters.ts";
import type { DevicePorts } from "./ports.ts";
import { VhostUserSession } from "./vhost-user.ts";

export interface DiskOptions {
  /** The disk owns the socket and the mapper from now on; the store stays the caller's. */
  readonly ports: DevicePorts;
  readonly store: BlockStore;
  readonly gate: DmaGate;
  readonly counters: DeviceCounters;
  /** What the guest reads as the disk's serial number; at most 20 bytes. */
  readonly serial?: string;
  /** The connection is over, and everything is released: why, or undefined when QEMU just left. */
  onClose(error: PeerError | HostError | undefined): void;
}

export interface Disk {
  readonly session: VhostUserSession;
  readonly device: BlockDevice;
  /** Idempotent; does not call onClose. */
  close(): void;
}

/** Serve a disk to the QEMU at the other end of the socket, from the handlers of the event loop. */
export function serveDisk(options: DiskOptions): Disk {
  const { socket, loop } = options.ports;
  const memory = new GuestMemory();
  const dma = new GatedMemory(memory, options.gate);
  const device = new BlockDevice(dma, options.store, options.counters, options.serial);

  /** What QEMU or the host does wrong ends this disk; a bug of ours goes on to the top. */
  const guarded = (handler: () => void) => () => {
    try {
      handler();
    } catch (error) {
      if (!(error instanceof PeerError || error instanceof HostError)) throw error;
      close();
      options.onClose(error instanceof PeerGone ? undefined : error);
    }
  };
  const ports: DevicePorts = {
    ...options.ports,
    loop: {
      watch: (fd, handler) => loop.watch(fd, guarded(handler)),
      unwatch: (fd) => loop.unwatch(fd),
    },
  };
  const session = new VhostUserSession(ports, memory, dma, device, options.counters);

  let open = true;
  const close = () => {
    if (!open) return;
    open = false;
    loop.unwatch(socket.fd);
    session.close();
    socket.close();
  };
  ports.loop.watch(socket.fd, () => session.serve());
  return { session, device, close };
}
