/** The mpqemu stream under fuzz: whatever a QEMU might send, with the real device behind it. */
import { HostError, PeerError, PeerGone, ProtocolError } from "../../src/base/errors.ts";
import type { Bdf } from "../../src/base/units.ts";
import { counters, countersBuffer } from "../../src/memory/counters.ts";
import { GuestMemory } from "../../src/memory/guest-memory.ts";
import { LruPolicy } from "../../src/policy/lru.ts";
import { createIommuBuffer, SoftwareIommu } from "../../src/tracking/software-iommu.ts";
import { TRACKING_COUNTERS, Tracker } from "../../src/tracking/tracker.ts";
import { type MessageSocket, MpqemuServer } from "../../src/transport/mpqemu.ts";
import { VirtioIommu } from "../../src/virtio/iommu.ts";
import { VirtioPciFunction } from "../../src/virtio/pci.ts";
import * as wire from "../../src/wire/mpqemu.ts";
import { putUint } from "../../src/wire/struct.ts";
import { FakeClock } from "../support/clock.ts";
import { HOST_BASE } from "../support/guest.ts";
import { FakePinner } from "../support/pinner.ts";
import { check } from "./device.ts";
import type { Next, Target } from "./fuzzer.ts";
import { items, itemsIn } from "./items.ts";

/** The RAM file that every fd stands for. */
const FILE_SIZE = 64 * 4096;
const FDS_MAX = 10;
const ANSWERED = [
  wire.MPQEMU_CMD_PCI_CFGREAD,
  wire.MPQEMU_CMD_PCI_CFGWRITE,
  wire.MPQEMU_CMD_BAR_READ,
  wire.MPQEMU_CMD_BAR_WRITE,
  wire.MPQEMU_CMD_DEVICE_RESET,
];

/** The peer's end of the socket. An item's kind is the number of fds that ride on its first byte. */
class Peer implements MessageSocket {
  readonly open = new Set<number>();
  readonly sent: Uint8Array[] = [];
  readonly #bytes: Uint8Array;
  readonly #fds = new Map<number, number[]>();
  #at = 0;

  constructor(input: Uint8Array) {
    const parts: Uint8Array[] = [];
    let length = 0;
    for (const { kind, bytes } of itemsIn(input)) {
      const fds = Array.from({ length: kind % FDS_MAX }, (_, i) => length * FDS_MAX + i);
      if (bytes.length) this.#fds.set(length, fds);
      parts.push(bytes);
      length += bytes.length;
    }
    this.#bytes = Buffer.concat(parts);
  }
  /** The command that comes next. */
  get command(): number {
    return this.#bytes.length - this.#at < 16 ? -1 : wire.MPQemuHeader.read(this.#bytes, this.#at).command;
  }
  receive(size: number): { bytes: Uint8Array; fds: number[] } {
    if (this.#at + size > this.#bytes.length) throw new PeerGone("the peer closed the connection");
    const fds: number[] = [];
    for (let at = this.#at; at < this.#at + size; at++) fds.push(...(this.#fds.get(at) ?? []));
    for (const fd of fds) this.open.add(fd);
    this.#at += size;
    return { bytes: this.#bytes.subarray(this.#at - size, this.#at), fds };
  }
  send(bytes: Uint8Array): void {
    this.sent.push(bytes);
  }
  close(fd: number): void {
    check(this.open.delete(fd), "an fd is closed twice");
  }
}

function serverFor(peer: Peer, closeFd: (fd: number) => void) {
  const clock = new FakeClock(0, 1e5);
  const memory = new GuestMemory();
  const pinner = new FakePinner();
  const file = new Uint8Array(FILE_SIZE);
  const tracker = new Tracker({
    memory,
    pinner,
    iommu: new SoftwareIommu(createIommuBuffer(2 ** 20), clock),
    policy: new LruPolicy(),
    clock,
    counters: counters(TRACKING_COUNTERS, countersBuffer(TRACKING_COUNTERS)),
    quota: Number.POSITIVE_INFINITY,
    beforeActivation: "bios",
  });
  const assigned = new Map([[0x20 as Bdf, 0]]);
  const device = new VirtioIommu({ memory, tracker, assigned, pinPage: true, hostError: () => {} });
  const server = new MpqemuServer({
    socket: peer,
    function: new VirtioPciFunction(device, memory),
    map(fd, offset, size) {
      closeFd(fd);
      if (!(offset >= 0 && size > 0 && offset + size <= FILE_SIZE))
        throw new ProtocolError("beyond the file");
      return { hostAddress: HOST_BASE + offset, bytes: file.subarray(offset, offset + size) };
    },
    closeFd,
    memory: (regions) => tracker.setMemory(regions),
  });
  return { server, tracker, pinner };
}

function run(input: Uint8Array, leaks = false): void {
  const peer = new Peer(input);
  const { server, tracker, pinner } = serverFor(peer, (fd) => {
    if (!leaks || peer.open.size < 2) peer.close(fd);
  });
  for (;;) {
    const { command } = peer;
    const before = peer.sent.length;
    let over = false;
    try {
      server.serve();
    } catch (error) {
      if (!(error instanceof PeerError || error instanceof HostError)) throw error;
      over = true;
    }
    check(peer.open.size === 0, "an fd is left open");
    if (over) return;
    check(
      peer.sent.length - before === (ANSWERED.includes(command) ? 1 : 0),
      "a message is not answered once",
    );
    check(tracker.pinned === pinner.pages.size, "the ledger and the host disagree");
    for (const address of pinner.pages.values())
      check(address >= HOST_BASE && address < HOST_BASE + FILE_SIZE, "what is not guest RAM is pinned");
  }
}

/** A message with its payload's size right more often than not, of numbers that mean something. */
function message(next: Next): Uint8Array {
  const command = next(9);
  const access = [wire.MPQEMU_CMD_PCI_CFGWRITE, wire.MPQEMU_CMD_PCI_CFGREAD].includes(command)
    ? wire.MPQemuPciConfig.encode({ address: next(300), value: next(2 ** 16), length: 1 << next(4) })
    : [wire.MPQEMU_CMD_BAR_WRITE, wire.MPQEMU_CMD_BAR_READ].includes(command)
      ? wire.MPQemuBarAccess.encode({
          address: [next(64), 0x2000 + next(100), 0x3000 + next(8), next(2 ** 15)][next(4)]!,
          value: BigInt(next(2) ? next(16) : next(2 ** 20)),
          size: 1 << next(4),
          memory: 1,
        })
      : new Uint8Array(command === wire.MPQEMU_CMD_SYNC_SYSMEM ? wire.SYSMEM_SIZE : 0);
  const regions = next(4);
  if (command === wire.MPQEMU_CMD_SYNC_SYSMEM)
    for (let i = 0; i < regions; i++) {
      const [gpa, size, offset] = [next(64), 1 + next(32), next(40)].map((frames) => BigInt(frames * 4096));
      [gpa!, size!, offset!].forEach((value, array) => void putUint(access, 64 * array + 8 * i, 8, value));
    }
  const size = next(16) ? access.length : next(256);
  const bytes = new Uint8Array([...wire.MPQemuHeader.encode({ command, size }), ...access]);
  return items.encode(command === wire.MPQEMU_CMD_SYNC_SYSMEM ? regions : next(8) ? 0 : next(4), bytes);
}

export const mpqemuTarget = (leaks = false): Target => ({
  name: "mpqemu",
  run: (input) => run(input, leaks),
  piece: message,
  boundaries: items.boundaries,
  explain: (input) =>
    itemsIn(input).map(({ kind, bytes }) => `${kind % FDS_MAX} fds: ${Buffer.from(bytes).toString("hex")}`),
});
