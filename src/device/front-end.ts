import { PeerGone, ProtocolError } from "../base/errors.ts";
import type { Gpa } from "../base/units.ts";
import { GuestMemory } from "../memory/guest-memory.ts";
import { DriverQueue, layoutAt } from "../virtio/driver-queue.ts";
import { VIRTIO_F_VERSION_1 } from "../wire/pci.ts";
import type { Value } from "../wire/struct.ts";
import * as wire from "../wire/vhost-user.ts";
import type { DevicePorts } from "./ports.ts";

const { VhostUserHeader: Header, VhostUserU64: U64 } = wire;

/** Where the front-end claims to have the guest's RAM mapped. */
export const USER_ADDRESS = 0x7f00_0000_0000;
const SOCKET_FD = 3;

/** Payload of SET_MEM_TABLE. */
export function memoryTable(...regions: Value<typeof wire.MemoryTableRegion.fields>[]) {
  const payload = new Uint8Array(wire.memoryTableSize(regions.length));
  wire.MemoryTableHead.write(payload, { count: regions.length });
  regions.forEach((region, i) => void wire.MemoryTableRegion.write(payload, region, wire.memoryTableSize(i)));
  return payload;
}

/**
 * The other side of a vhost-user back-end, in memory: a VMM with a guest of one RAM region, the host's ports, and an
 * account of every fd. The test tool for device models; bytes are as QEMU sends them.
 */
export class FrontEnd {
  readonly ram: Uint8Array<ArrayBuffer>;
  readonly memory: GuestMemory;
  /** fds that the back-end holds, and how often each was signalled by either side. */
  readonly open = new Set<number>();
  readonly signals = new Map<number, number>();
  readonly #handlers = new Map<number, () => void>();
  #inbox: { bytes: Uint8Array; fds: number[] }[] = [];
  #outbox: Uint8Array[] = [];
  #nextFd = 100;
  /** The back-end closed the connection. */
  closed = false;
  /** The back-end says that it may do DMA. */
  mastering = false;

  constructor(ramSize = 2 ** 20) {
    this.ram = new Uint8Array(ramSize);
    this.memory = new GuestMemory([{ gpa: 0 as Gpa, size: ramSize, hostAddress: 0, bytes: this.ram }]);
  }

  readonly ports: DevicePorts = {
    socket: {
      fd: SOCKET_FD,
      receive: (size) => this.#receive(size),
      send: (bytes) => void this.#outbox.push(bytes),
      close: () => {
        this.closed = true;
      },
    },
    loop: {
      watch: (fd, handler) => void this.#handlers.set(fd, handler),
      unwatch: (fd) => void this.#handlers.delete(fd),
    },
    mapper: {
      map: (fd, offset, size) => {
        this.ports.fds.close(fd);
        if (offset + size > this.ram.length) throw new ProtocolError("beyond the file");
        return { hostAddress: offset, bytes: this.ram.subarray(offset, offset + size) };
      },
      close: () => {},
    },
    fds: {
      signal: (fd) => void this.signals.set(fd, (this.signals.get(fd) ?? 0) + 1),
      drain: (fd) => void this.signals.delete(fd),
      close: (fd) => {
        if (!this.open.delete(fd)) throw new Error(`fd ${fd} is closed twice`);
      },
    },
    mastering: (on) => {
      this.mastering = on;
    },
  };

  #receive(size: number): { bytes: Uint8Array; fds: number[] } {
    const bytes = new Uint8Array(size);
    const fds: number[] = [];
    for (let done = 0; done < size; ) {
      const first = this.#inbox[0];
      if (!first) {
        fds.forEach((fd) => void this.ports.fds.close(fd)); // as host/socket.ts does
        throw new PeerGone("no more messages");
      }
      fds.push(...first.fds.splice(0));
      const part = first.bytes.subarray(0, size - done);
      bytes.set(part, done);
      done += part.length;
      first.bytes = first.bytes.subarray(part.length);
      if (first.bytes.length === 0) this.#inbox.shift();
    }
    return { bytes, fds };
  }

  /** fds that came with bytes which the back-end has not received. */
  get unread(): number {
    return this.#inbox.reduce((sum, message) => sum + message.fds.length, 0);
  }

  newFd(): number {
    this.open.add(this.#nextFd);
    return this.#nextFd++;
  }

  /** Raw bytes to the back-end, which serves them; its answer, if any. */
  raw(bytes: Uint8Array, fds: number[] = []): Uint8Array | undefined {
    this.#inbox.push({ bytes, fds });
    this.#handlers.get(SOCKET_FD)?.();
    return this.#outbox.shift();
  }

  /** A message; the payload of its answer. */
  send(request: number, payload = new Uint8Array(0), fds: number[] = [], flags = 1): Uint8Array | undefined {
    const message = Header.encode({ request, flags, size: payload.length }, payload.length);
    message.set(payload, Header.size);
    return this.raw(message, fds)?.subarray(Header.size);
  }

  /** As send, with an acknowledgement asked for: true when it says so. */
  acknowledged(request: number, payload?: Uint8Array<ArrayBuffer>, fds: number[] = []): boolean {
    const reply = this.send(request, payload, fds, 1 | wire.VHOST_USER_NEED_REPLY_MASK);
    if (!reply) throw new Error(`request ${request} was not acknowledged`);
    return U64.read(reply).value === 0n;
  }

  u64(request: number, value?: bigint): bigint | undefined {
    const reply = this.send(request, value === undefined ? undefined : U64.encode({ value }));
    return reply && U64.read(reply).value;
  }

  /** All that QEMU does until the features and the guest's RAM are settled. */
  negotiate(features = 1n << BigInt(VIRTIO_F_VERSION_1)): void {
    this.u64(wire.VHOST_USER_GET_FEATURES);
    const offered = this.u64(wire.VHOST_USER_GET_PROTOCOL_FEATURES)!;
    this.u64(wire.VHOST_USER_SET_PROTOCOL_FEATURES, offered);
    this.send(wire.VHOST_USER_SET_OWNER);
    this.u64(wire.VHOST_USER_SET_FEATURES, features | (1n << BigInt(wire.VHOST_USER_F_PROTOCOL_FEATURES)));
    const region = { gpa: 0, size: this.ram.length, userAddress: USER_ADDRESS, mmapOffset: 0 };
    this.send(wire.VHOST_USER_SET_MEM_TABLE, memoryTable(region), [this.newFd()]);
  }

  /** A ring of 16 entries at `gpa`, running, with its driver's side and a kick that the back-end serves at once. */
  startRing(gpa = 0x1000, base = 0) {
    const layout = layoutAt(gpa, 16);
    const state = (num: number) => wire.VringState.encode({ index: 0, num });
    const kickFd = this.newFd();
    const callFd = this.newFd();
    this.acknowledged(wire.VHOST_USER_SET_VRING_NUM, state(16));
    this.acknowledged(wire.VHOST_USER_SET_VRING_BASE, state(base));
    const address = {
      descriptor: USER_ADDRESS + layout.desc,
      available: USER_ADDRESS + layout.driver,
      used: USER_ADDRESS + layout.device,
    };
    this.acknowledged(wire.VHOST_USER_SET_VRING_ADDR, wire.VringAddr.encode(address));
    this.acknowledged(wire.VHOST_USER_SET_VRING_KICK, U64.encode({ value: 0n }), [kickFd]);
    this.acknowledged(wire.VHOST_USER_SET_VRING_CALL, U64.encode({ value: 0n }), [callFd]);
    this.acknowledged(wire.VHOST_USER_SET_VRING_ENABLE, state(1));
    const queue = new DriverQueue(this.memory, layout);
    return { layout, queue, kickFd, callFd, kick: () => this.kick(kickFd) };
  }

  /** Signal an eventfd of ours; its handler runs as long as it is signalled. */
  kick(fd: number): void {
    this.ports.fds.signal(fd);
    while (this.signals.has(fd) && this.#handlers.has(fd)) this.#handlers.get(fd)!();
  }
}
