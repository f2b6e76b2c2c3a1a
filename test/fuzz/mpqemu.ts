/** The mpqemu stream under fuzz: whatever a QEMU might send, with a real function behind it, of either kind. */
import { HostError, NotGuestRam, PeerError, PeerGone, ProtocolError } from "../../src/base/errors.ts";
import type { Bdf } from "../../src/base/units.ts";
import { counters, countersBuffer } from "../../src/memory/counters.ts";
import { GuestMemory } from "../../src/memory/guest-memory.ts";
import { createPolicy } from "../../src/policy/registry.ts";
import { createIommuBuffer, SoftwareIommu } from "../../src/tracking/software-iommu.ts";
import { TRACKING_COUNTERS, Tracker } from "../../src/tracking/tracker.ts";
import { type MessageSocket, MpqemuServer } from "../../src/transport/mpqemu.ts";
import { createFrontEnd, type FrontEndName } from "../../src/virtio/front-end.ts";
import * as crosvm from "../../src/wire/crosvm.ts";
import * as wire from "../../src/wire/mpqemu.ts";
import { barRegister } from "../../src/wire/pci.ts";
import { putUint } from "../../src/wire/struct.ts";
import { FakeClock } from "../support/clock.ts";
import { HOST_BASE, PRESENT } from "../support/guest.ts";
import { FakePinner } from "../support/pinner.ts";
import { check } from "./device.ts";
import type { Next, Target } from "./fuzzer.ts";
import { items, itemsIn } from "./items.ts";

/** The RAM file that every fd stands for. */
const FILE_SIZE = 64 * 4096;
const FDS_MAX = 10;
/** Of the guest behind the crosvm-compatible function. */
const QUOTA = 2;
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

/** What a broken twin replaces. */
interface Broken {
  readonly leaks?: boolean;
  readonly quota?: number;
  readonly Tracker?: typeof Tracker;
}
interface Parts extends Broken {
  readonly frontEnd: FrontEndName;
}

function serverFor(peer: Peer, { frontEnd, ...broken }: Parts, closeFd: (fd: number) => void) {
  const limited = frontEnd === "crosvm";
  const clock = new FakeClock(0, 1e5);
  const memory = new GuestMemory();
  const pinner = new FakePinner();
  const file = new Uint8Array(FILE_SIZE);
  const tracker = new (broken.Tracker ?? Tracker)({
    memory,
    pinner,
    iommu: new SoftwareIommu(createIommuBuffer(2 ** 20), clock),
    policy: createPolicy("lru"),
    clock,
    counters: counters(TRACKING_COUNTERS, countersBuffer(TRACKING_COUNTERS)),
    quota: broken.quota ?? (limited ? QUOTA : Number.POSITIVE_INFINITY),
    beforeActivation: limited ? "none" : "bios",
  });
  const assigned = new Map([[0x20 as Bdf, 0]]);
  const { pci } = createFrontEnd(frontEnd, { memory, tracker, assigned, pinPage: true, hostError: () => {} });
  const server = new MpqemuServer({
    socket: peer,
    function: pci,
    map(fd, offset, size) {
      closeFd(fd);
      if (!(offset >= 0 && size > 0 && offset + size <= FILE_SIZE))
        throw new ProtocolError("beyond the file");
      const hostAddress = HOST_BASE + offset;
      const bytes = file.subarray(offset, offset + size);
      return { hostAddress, presentAddress: PRESENT + hostAddress, bytes };
    },
    closeFd,
    memory: (regions) => tracker.setMemory(regions),
  });
  return { server, tracker, pinner };
}

function run(input: Uint8Array, parts: Parts): void {
  const peer = new Peer(input);
  const { server, tracker, pinner } = serverFor(peer, parts, (fd) => {
    if (!parts.leaks || peer.open.size < 2) peer.close(fd);
  });
  for (;;) {
    const { command } = peer;
    const before = peer.sent.length;
    let over = false;
    try {
      server.serve();
    } catch (error) {
      if (!(error instanceof PeerError || error instanceof HostError)) throw error;
      check(command !== wire.MPQEMU_CMD_BAR_WRITE || !(error instanceof NotGuestRam), "a guest ends its VM");
      over = true;
    }
    check(peer.open.size === 0, "an fd is left open");
    if (over) return;
    check(
      peer.sent.length - before === (ANSWERED.includes(command) ? 1 : 0),
      "a message is not answered once",
    );
    check(tracker.pinned === pinner.pages.size, "the ledger and the host disagree");
    check(parts.frontEnd !== "crosvm" || tracker.pinned <= QUOTA, "more is pinned than the quota allows");
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

/** Where the BARs of the crosvm-compatible function lie, if the guest puts them there. */
const SLOTS_AT = 0x10000;
const barWrite = (address: number, value: bigint, size: number): Uint8Array =>
  items.encode(
    0,
    Uint8Array.of(
      ...wire.MPQemuHeader.encode({ command: wire.MPQEMU_CMD_BAR_WRITE, size: wire.MPQemuBarAccess.size }),
      ...wire.MPQemuBarAccess.encode({ address, value, size, memory: 1 }),
    ),
  );
const mapSlots = items.encode(
  0,
  Uint8Array.of(
    ...wire.MPQemuHeader.encode({ command: wire.MPQEMU_CMD_PCI_CFGWRITE, size: wire.MPQemuPciConfig.size }),
    ...wire.MPQemuPciConfig.encode({
      address: barRegister(crosvm.COIOMMU_NOTIFYMAP_BAR),
      value: SLOTS_AT,
      length: 4,
    }),
  ),
);

/** All of the file is RAM, from 0 on. */
function allRam(): Uint8Array {
  const payload = new Uint8Array(wire.SYSMEM_SIZE);
  putUint(payload, 64, 8, BigInt(FILE_SIZE));
  const head = wire.MPQemuHeader.encode({ command: wire.MPQEMU_CMD_SYNC_SYSMEM, size: payload.length });
  return items.encode(1, Uint8Array.of(...head, ...payload));
}

/** What a driver of that function does, with numbers that are right more often than not. The table is one leaf. */
function request(next: Next): Uint8Array {
  const { dttRoot, command, dttLevel } = crosvm.CoiommuRegisters.fields;
  const gfn = BigInt(next(8) ? next(64) : next(2 ** 30));
  const bdf = next(8) ? 0x20n : BigInt(next(2 ** 16));
  const list = crosvm.PIN_PAGES_IN_BATCH | BigInt(4096 * next(70));
  const slot = next(4);
  switch (next(4)) {
    case 0:
      return message(next);
    case 1:
      return Uint8Array.of(
        ...(next(2) ? allRam() : []),
        ...mapSlots,
        ...barWrite(dttRoot.at, BigInt(4096 * next(66)), 8),
        ...barWrite(dttLevel.at, BigInt(next(8) ? 1 : next(8)), 8),
        ...barWrite(command.at, BigInt(next(8) ? 1 : next(6)), 8),
      );
    default:
      return Uint8Array.of(
        ...barWrite(SLOTS_AT + crosvm.CoiommuSlot.size * slot, next(4) ? (gfn << 16n) | bdf : list, 8),
        ...barWrite(crosvm.COIOMMU_TRIGGERS + slot, 1n, 1),
      );
  }
}

const target = (name: string, parts: Parts, piece: Target["piece"]): Target => ({
  name,
  run: (input) => run(input, parts),
  piece,
  boundaries: items.boundaries,
  explain: (input) =>
    itemsIn(input).map(({ kind, bytes }) => `${kind % FDS_MAX} fds: ${Buffer.from(bytes).toString("hex")}`),
});

export const mpqemuTarget = (broken: Broken = {}): Target =>
  target("mpqemu", { ...broken, frontEnd: "virtio-iommu" }, message);
export const crosvmTarget = (broken: Broken = {}): Target =>
  target("crosvm", { ...broken, frontEnd: "crosvm" }, request);
