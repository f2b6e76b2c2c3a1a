import { PeerError, ProtocolError } from "../base/errors.ts";
import { GFN_LIMIT, type Gpa, gfnOf } from "../base/units.ts";
import type { GuestAccess, GuestMemory, GuestRegion } from "../memory/guest-memory.ts";
import { type QueueLayout, SplitQueue } from "../virtio/queue.ts";
import { VIRTIO_F_VERSION_1 } from "../wire/pci.ts";
import * as wire from "../wire/vhost-user.ts";
import type { DevicePorts } from "./ports.ts";
import type { ChainHandler, QueueCounters } from "./queue-runner.ts";
import { Vring } from "./vring.ts";

/** A device model behind vhost-user. */
export interface VhostDevice {
  /** Feature bits of its device type (0..23). */
  readonly features: bigint;
  readonly queues: number;
  /** Its configuration space, at most 256 bytes. */
  readonly config: Uint8Array;
  readonly handle: ChainHandler;
}

interface Request {
  /** Payload bytes; absent where `serve` checks them itself. */
  readonly size?: number;
  /** The front-end waits for the reply, or goes on wrongly without: a failure ends the session. */
  readonly vital?: true;
  /** Takes the fds it keeps out of `fds`. Returns the reply's payload, if there is one beside REPLY_ACK. */
  serve(payload: Uint8Array, fds: number[]): Uint8Array | undefined;
}

/** More than any message: the largest are 264 (memory table) and 268 (configuration). A longer one is no message. */
const PAYLOAD_MAX = 4096;

const bit = (n: number) => 1n << BigInt(n);
const {
  VhostUserHeader: Header,
  VhostUserU64: U64,
  VringState,
  VringAddr,
  ConfigHead,
  MemoryTableHead,
} = wire;

/** "back-end uses zero length of payload to indicate an error". */
const CONFIG_ERROR = new Uint8Array(0);

const PROTOCOL_FEATURES =
  bit(wire.VHOST_USER_PROTOCOL_F_MQ) |
  bit(wire.VHOST_USER_PROTOCOL_F_REPLY_ACK) |
  bit(wire.VHOST_USER_PROTOCOL_F_BACKEND_REQ) |
  bit(wire.VHOST_USER_PROTOCOL_F_CONFIG);

/**
 * The back-end's side of one vhost-user connection: QEMU docs/interop/vhost-user.rst. What a message gets wrong is
 * counted, answered where an answer was asked for (REPLY_ACK), and changes nothing.
 *
 * ACCESS_PLATFORM is offered so that the guest's driver uses the DMA API. QEMU does not acknowledge it to us unless
 * it has a vIOMMU of its own in front of the device, whose IOTLB messages are not served: that ends the session.
 */
export class VhostUserSession {
  readonly #p: DevicePorts;
  readonly #memory: GuestMemory;
  readonly #device: VhostDevice;
  readonly #rings: Vring[];
  readonly #offered: bigint;
  #protocolFeatures = 0n;
  #table: { gpa: number; size: number; userAddress: number }[] = [];
  #backendFd: number | undefined;
  #running = 0;
  /** Messages that were served, and those that were refused. */
  messages = 0;
  refused = 0;

  /** `dma` is `memory` as the device may reach it. */
  constructor(
    ports: DevicePorts,
    memory: GuestMemory,
    dma: GuestAccess,
    device: VhostDevice,
    counters: QueueCounters,
  ) {
    this.#p = ports;
    this.#memory = memory;
    this.#device = device;
    const handle: ChainHandler = (chain) => device.handle(chain);
    const running = (on: boolean) => {
      this.#running += on ? 1 : -1;
      ports.mastering(this.#running > 0);
    };
    this.#rings = Array.from(
      { length: device.queues },
      () => new Vring({ loop: ports.loop, fds: ports.fds, memory: dma, handle, counters, running }),
    );
    this.#offered =
      device.features |
      bit(wire.VHOST_USER_F_PROTOCOL_FEATURES) |
      bit(VIRTIO_F_VERSION_1) |
      bit(wire.VIRTIO_F_ACCESS_PLATFORM);
  }

  /** Serve one message, which poll() said is there. Throws PeerGone at the end, PeerError when it cannot go on. */
  serve(): void {
    const { bytes, fds: received } = this.#p.socket.receive(Header.size);
    const fds = [...received];
    try {
      const { request, flags, size } = Header.read(bytes);
      const version = flags & (wire.VHOST_USER_VERSION_MASK | wire.VHOST_USER_REPLY_MASK);
      if (version !== wire.VHOST_USER_VERSION || size > PAYLOAD_MAX)
        throw new ProtocolError(`vhost-user: request ${request} with flags ${flags}, ${size} bytes`);
      const rest = this.#p.socket.receive(size);
      fds.push(...rest.fds);
      this.#answer(request, flags, this.#dispatch(request, rest.bytes, fds));
    } finally {
      fds.forEach((fd) => void this.#p.fds.close(fd));
    }
  }

  close(): void {
    for (const ring of this.#rings) ring.close();
    this.#keepBackendFd(undefined);
    this.#table = [];
    this.#memory.setRegions([]);
    this.#p.mapper.close();
  }

  /** The reply's payload, "done" or "refused". */
  #dispatch(code: number, payload: Uint8Array, fds: number[]): Uint8Array | "done" | "refused" {
    const request = this.#requests.get(code);
    try {
      if (!request) throw new ProtocolError(`vhost-user: unknown request ${code}`);
      if (request.size !== undefined && request.size !== payload.length)
        throw new ProtocolError(`vhost-user: request ${code} with ${payload.length} bytes`);
      const reply = request.serve(payload, fds);
      this.messages++;
      return reply ?? "done";
    } catch (error) {
      if (!(error instanceof PeerError)) throw error;
      this.refused++;
      if (request?.vital) throw error;
      return "refused";
    }
  }

  #answer(request: number, flags: number, result: Uint8Array | "done" | "refused"): void {
    let payload = result;
    if (typeof payload === "string") {
      const acknowledge = this.#protocolFeatures & bit(wire.VHOST_USER_PROTOCOL_F_REPLY_ACK);
      if (!acknowledge || !(flags & wire.VHOST_USER_NEED_REPLY_MASK)) return;
      payload = U64.encode({ value: payload === "done" ? 0n : 1n });
    }
    const head = { request, flags: wire.VHOST_USER_VERSION | wire.VHOST_USER_REPLY_MASK };
    const message = Header.encode({ ...head, size: payload.length }, payload.length);
    message.set(payload, Header.size);
    this.#p.socket.send(message);
  }

  readonly #requests = new Map<number, Request>([
    [wire.VHOST_USER_GET_FEATURES, get(() => this.#offered)],
    [wire.VHOST_USER_SET_FEATURES, setU64((value) => this.#setFeatures(value))],
    [wire.VHOST_USER_GET_PROTOCOL_FEATURES, get(() => PROTOCOL_FEATURES)],
    [wire.VHOST_USER_SET_PROTOCOL_FEATURES, setU64((value) => this.#setProtocolFeatures(value))],
    [wire.VHOST_USER_GET_QUEUE_NUM, get(() => BigInt(this.#rings.length))],
    [wire.VHOST_USER_SET_OWNER, command(() => {})],
    [wire.VHOST_USER_RESET_OWNER, command(() => this.#rings.forEach((ring) => void ring.enable(false)))],
    [wire.VHOST_USER_SET_MEM_TABLE, { serve: (payload, fds) => this.#setMemTable(payload, fds) }],
    [wire.VHOST_USER_SET_VRING_NUM, this.#setRing((ring, num) => ring.setSize(num))],
    [wire.VHOST_USER_SET_VRING_BASE, this.#setRing((ring, num) => ring.setBase(num))],
    [wire.VHOST_USER_SET_VRING_ENABLE, this.#setRing((ring, num) => ring.enable(num !== 0))],
    [wire.VHOST_USER_SET_VRING_ADDR, { size: VringAddr.size, serve: (p) => this.#setRingAddress(p) }],
    [
      wire.VHOST_USER_GET_VRING_BASE,
      { size: VringState.size, vital: true, serve: (payload) => this.#stopRing(payload) },
    ],
    [wire.VHOST_USER_SET_VRING_KICK, this.#setRingFd((ring, fd) => ring.setKick(fd), true)],
    [wire.VHOST_USER_SET_VRING_CALL, this.#setRingFd((ring, fd) => ring.setCall(fd))],
    [wire.VHOST_USER_SET_VRING_ERR, this.#setRingFd((ring, fd) => ring.setErr(fd))],
    [
      wire.VHOST_USER_SET_BACKEND_REQ_FD,
      { size: 0, serve: (_payload, fds) => this.#keepBackendFd(fds.shift()) },
    ],
    [wire.VHOST_USER_GET_CONFIG, { vital: true, serve: (payload) => this.#getConfig(payload) }],
    [wire.VHOST_USER_SET_CONFIG, { serve: refuseSetConfig }],
  ]);

  #setFeatures(value: bigint): void {
    if (value & ~this.#offered) throw new ProtocolError(`vhost-user: features 0x${value.toString(16)}`);
    if (value & bit(wire.VIRTIO_F_ACCESS_PLATFORM))
      throw new ProtocolError("vhost-user: QEMU has a vIOMMU in front of this device; start it without");
    for (const ring of this.#rings) {
      // "Ring states": without protocol features, rings start enabled.
      if (!(value & bit(wire.VHOST_USER_F_PROTOCOL_FEATURES))) ring.enable(true);
    }
  }

  #setProtocolFeatures(value: bigint): void {
    if (value & ~PROTOCOL_FEATURES)
      throw new ProtocolError(`vhost-user: protocol features 0x${value.toString(16)}`);
    this.#protocolFeatures = value;
  }

  #setMemTable(payload: Uint8Array, fds: number[]): undefined {
    const count = payload.length < MemoryTableHead.size ? -1 : MemoryTableHead.read(payload).count;
    if (count < 0 || count > wire.VHOST_USER_REGIONS_MAX || payload.length !== wire.memoryTableSize(count))
      throw new ProtocolError(`vhost-user: memory table of ${count} regions in ${payload.length} bytes`);
    if (fds.length !== count) throw new ProtocolError(`vhost-user: ${count} regions with ${fds.length} fds`);
    const table = Array.from({ length: count }, (_, i) => wire.memoryTableRegion(payload, i));
    for (const { gpa, size } of table)
      if (size === 0 || gfnOf(gpa + size) > GFN_LIMIT)
        throw new ProtocolError(`vhost-user: region 0x${gpa.toString(16)}+0x${size.toString(16)}`);
    const regions = table.map(({ gpa, size, mmapOffset }): GuestRegion => {
      return { gpa: gpa as Gpa, size, ...this.#p.mapper.map(fds.shift()!, mmapOffset, size) };
    });
    this.#memory.setRegions(regions);
    this.#table = table;
  }

  #setRingAddress(payload: Uint8Array): undefined {
    const { index, descriptor, available, used } = VringAddr.read(payload);
    const ring = this.#ring(index);
    const theirs = { size: ring.size, desc: descriptor, driver: available, device: used } as QueueLayout;
    const [desc, driver, device] = SplitQueue.extents(theirs).map((part) =>
      this.#guestAddress(part.gpa, part.length),
    );
    ring.setLayout({ size: ring.size, desc: desc!, driver: driver!, device: device! });
  }

  /** Where the front-end's memory at `address` is in the guest. */
  #guestAddress(address: number, length: number): Gpa {
    for (const { gpa, size, userAddress } of this.#table)
      if (address >= userAddress && address + length <= userAddress + size)
        return (gpa + (address - userAddress)) as Gpa;
    throw new ProtocolError(`vhost-user: ring address 0x${address.toString(16)} is not in the memory table`);
  }

  #stopRing(payload: Uint8Array): Uint8Array {
    const { index } = VringState.read(payload);
    return VringState.encode({ index, num: this.#ring(index).stop() });
  }

  #getConfig(payload: Uint8Array): Uint8Array {
    if (payload.length < ConfigHead.size) return CONFIG_ERROR;
    const { offset, size, flags } = ConfigHead.read(payload);
    if (payload.length !== ConfigHead.size + size || offset + size > wire.VHOST_USER_CONFIG_MAX)
      return CONFIG_ERROR;
    const reply = ConfigHead.encode({ offset, size, flags }, size);
    reply.set(this.#device.config.subarray(offset, offset + size), ConfigHead.size);
    return reply;
  }

  /** A channel for requests of ours. There are none; but QEMU complains when it is closed. */
  #keepBackendFd(fd: number | undefined): undefined {
    if (this.#backendFd !== undefined) this.#p.fds.close(this.#backendFd);
    this.#backendFd = fd;
  }

  #ring(index: number): Vring {
    const ring = this.#rings[index];
    if (!ring) throw new ProtocolError(`vhost-user: ring ${index} of ${this.#rings.length}`);
    return ring;
  }

  #setRing(apply: (ring: Vring, num: number) => void): Request {
    return {
      size: VringState.size,
      serve: (payload) => {
        const { index, num } = VringState.read(payload);
        apply(this.#ring(index), num);
        return undefined;
      },
    };
  }

  #setRingFd(apply: (ring: Vring, fd: number | undefined) => void, required = false): Request {
    return {
      size: U64.size,
      serve: (payload, fds) => {
        const value = Number(U64.read(payload).value & 0xffffn);
        const expected = value & wire.VHOST_USER_VRING_NOFD_MASK ? 0 : 1;
        if (fds.length !== expected)
          throw new ProtocolError(`vhost-user: ${fds.length} fds instead of ${expected}`);
        if (required && expected === 0) throw new ProtocolError("vhost-user: rings are not polled");
        apply(this.#ring(value & wire.VHOST_USER_VRING_IDX_MASK), fds.shift());
        return undefined;
      },
    };
  }
}

const get = (value: () => bigint): Request => ({
  size: 0,
  vital: true,
  serve: () => U64.encode({ value: value() }),
});

const setU64 = (set: (value: bigint) => void): Request => ({
  size: U64.size,
  vital: true,
  serve: (payload) => {
    set(U64.read(payload).value);
    return undefined;
  },
});

const command = (run: () => void): Request => ({
  size: 0,
  serve: () => {
    run();
    return undefined;
  },
});

/** Nothing in the configuration is writable without features that are not offered. */
function refuseSetConfig(): never {
  throw new ProtocolError("vhost-user: the configuration is read-only");
}
