import { ProtocolError } from "../base/errors.ts";
import type { Gpa } from "../base/units.ts";
import type { GuestRegion } from "../memory/guest-memory.ts";
import type { PciFunction } from "../virtio/device.ts";
import {
  MPQEMU_CMD_BAR_READ,
  MPQEMU_CMD_BAR_WRITE,
  MPQEMU_CMD_DEVICE_RESET,
  MPQEMU_CMD_PCI_CFGREAD,
  MPQEMU_CMD_PCI_CFGWRITE,
  MPQEMU_CMD_RET,
  MPQEMU_CMD_SET_IRQFD,
  MPQEMU_CMD_SYNC_SYSMEM,
  MPQEMU_RET_ERROR,
  MPQemuBarAccess,
  MPQemuHeader,
  MPQemuPciConfig,
  MPQemuRet,
  REMOTE_MAX_FDS,
  SYSMEM_SIZE,
  sysmemEntry,
} from "../wire/mpqemu.ts";

/** The socket; host/socket.ts implements it. receive() blocks for exactly `size` bytes, and throws PeerGone. */
export interface MessageSocket {
  receive(size: number): { readonly bytes: Uint8Array; readonly fds: readonly number[] };
  send(bytes: Uint8Array): void;
}

export interface MpqemuPorts {
  readonly socket: MessageSocket;
  readonly function: PciFunction;
  /** Map `size` bytes at `offset` of a RAM file. Takes over `fd`. */
  map(fd: number, offset: number, size: number): Omit<GuestRegion, "gpa" | "size">;
  closeFd(fd: number): void;
  /** QEMU's memory map has changed. */
  memory(regions: readonly GuestRegion[]): void;
}

const PAYLOAD_SIZES = new Map<number, number>([
  [MPQEMU_CMD_SYNC_SYSMEM, SYSMEM_SIZE],
  [MPQEMU_CMD_PCI_CFGWRITE, MPQemuPciConfig.size],
  [MPQEMU_CMD_PCI_CFGREAD, MPQemuPciConfig.size],
  [MPQEMU_CMD_BAR_WRITE, MPQemuBarAccess.size],
  [MPQEMU_CMD_BAR_READ, MPQemuBarAccess.size],
  [MPQEMU_CMD_SET_IRQFD, 0],
  [MPQEMU_CMD_DEVICE_RESET, 0],
]);

/**
 * Serves a PCI function to an unmodified QEMU (`-device x-pci-proxy-dev`). QEMU waits for the answer with the vCPU
 * that made the access, so each message is served at once and in full.
 */
export class MpqemuServer {
  readonly #p: MpqemuPorts;
  /** Messages served. */
  messages = 0;

  constructor(ports: MpqemuPorts) {
    this.#p = ports;
  }

  /** Serve one message, which poll() said is there. Throws PeerGone at the end, ProtocolError for a broken stream. */
  serve(): void {
    const header = this.#p.socket.receive(MPQemuHeader.size);
    const fds = [...header.fds];
    try {
      const { command, size } = MPQemuHeader.read(header.bytes);
      const expected = PAYLOAD_SIZES.get(command);
      if (expected === undefined) throw new ProtocolError(`mpqemu: unknown command ${command}`);
      if (size !== expected)
        throw new ProtocolError(`mpqemu: command ${command} with ${size} bytes instead of ${expected}`);
      const payload = this.#p.socket.receive(size);
      fds.push(...payload.fds); // QEMU sends them with the header; a peer that does not must not leak them here
      this.messages++;
      this.#dispatch(command, payload.bytes, fds);
    } finally {
      for (const fd of fds) this.#p.closeFd(fd);
    }
  }

  /** Takes what it keeps out of `fds`. */
  #dispatch(command: number, payload: Uint8Array, fds: number[]): void {
    switch (command) {
      case MPQEMU_CMD_SYNC_SYSMEM:
        this.#syncMemory(payload, fds); // no reply
        return;
      case MPQEMU_CMD_SET_IRQFD: // no reply; this function raises no interrupt
        return;
      case MPQEMU_CMD_DEVICE_RESET:
        this.#p.function.reset();
        this.#reply(0n);
        return;
      case MPQEMU_CMD_PCI_CFGREAD:
      case MPQEMU_CMD_PCI_CFGWRITE:
        this.#reply(this.#config(command, payload));
        return;
      default:
        this.#reply(this.#bar(command, payload));
    }
  }

  #config(command: number, payload: Uint8Array): bigint {
    const { address, value, length } = MPQemuPciConfig.read(payload);
    if (![1, 2, 4].includes(length) || address > 0x1000 - length) return MPQEMU_RET_ERROR;
    if (command === MPQEMU_CMD_PCI_CFGREAD) return BigInt(this.#p.function.configRead(address, length));
    this.#p.function.configWrite(address, length, value);
    return 0n;
  }

  #bar(command: number, payload: Uint8Array): bigint {
    const { address, value, size } = MPQemuBarAccess.read(payload);
    if (![1, 2, 4, 8].includes(size)) return MPQEMU_RET_ERROR;
    if (command === MPQEMU_CMD_BAR_READ) return this.#p.function.barRead(address, size);
    this.#p.function.barWrite(address, size, value);
    return 0n;
  }

  #syncMemory(payload: Uint8Array, fds: number[]): void {
    if (fds.length > REMOTE_MAX_FDS) throw new ProtocolError(`mpqemu: ${fds.length} memory regions`);
    const regions: GuestRegion[] = [];
    for (let i = 0; fds.length > 0; i++) {
      const { gpa, size, offset } = sysmemEntry(payload, i);
      regions.push({ gpa: gpa as Gpa, size, ...this.#p.map(fds.shift()!, offset, size) });
    }
    this.#p.memory(regions);
  }

  #reply(value: bigint): void {
    const message = MPQemuHeader.encode({ command: MPQEMU_CMD_RET, size: MPQemuRet.size }, MPQemuRet.size);
    MPQemuRet.write(message, { value }, MPQemuHeader.size);
    this.#p.socket.send(message);
  }
}
