/** The disk's vhost-user session under fuzz: a VMM's messages and a guest's rings, both hostile. */
import { type HostError, NotGuestRam, type PeerError } from "../../src/base/errors.ts";
import type { Gfn } from "../../src/base/units.ts";
import { MemoryStore } from "../../src/device/block-store.ts";
import { serveDisk } from "../../src/device/disk.ts";
import { FrontEnd, memoryTable, USER_ADDRESS } from "../../src/device/front-end.ts";
import { type DmaGate, NO_FRAME } from "../../src/memory/gated-memory.ts";
import { layoutAt } from "../../src/virtio/driver-queue.ts";
import { VIRTIO_F_VERSION_1 } from "../../src/wire/pci.ts";
import * as wire from "../../src/wire/vhost-user.ts";
import { VirtioBlkReqHead } from "../../src/wire/virtio-blk.ts";
import { Desc } from "../../src/wire/virtqueue.ts";
import { check } from "./device.ts";
import type { Next, Target } from "./fuzzer.ts";
import { items, itemsIn } from "./items.ts";

/** What an item's kind says, modulo 8. 0 to 3: a message with so many fds. */
const STORE = 4; // bytes: a GPA of 4 bytes, then what the guest stores there
const KICK = 5; // bytes: which of the fds that the session was given
const FORBID = 6; // bytes: frames of which the IOMMU's mind changes
const GO_ON = 7; // the message before was cut; this is more of it

const RAM_SIZE = 32 * 4096;
const SECTORS = 64;
/** Fds that the front-end has handed out begin here. */
const FIRST_FD = 100;

/** An IOMMU that counts windows, and tells accesses outside of them. */
class Gate implements DmaGate {
  readonly forbidden = new Set<number>();
  open = 0;
  enter(): void {
    check(this.open++ === 0, "DMA windows are nested");
  }
  leave(): void {
    check(--this.open === 0, "a DMA window is closed twice");
  }
  translate(page: number): Gfn | typeof NO_FRAME {
    check(this.open === 1, "a frame is looked up outside a DMA window");
    return this.forbidden.has(page) ? NO_FRAME : (page as Gfn);
  }
  request(): boolean {
    check(this.open === 0, "a device waits inside a DMA window");
    return false;
  }
  fault(): void {}
}

/** `leaks`: a broken twin, whose session forgets the fds that it holds at its end. */
function run(input: Uint8Array, leaks = false): void {
  const frontEnd = new FrontEnd(RAM_SIZE);
  const gate = new Gate();
  let ended = false;
  const disk = serveDisk({
    ports: frontEnd.ports,
    store: new MemoryStore(SECTORS),
    gate,
    counters: { transfers: 0, bytes: 0, faults: 0, errors: 0, requests: 0 },
    onClose: (_error: PeerError | HostError | undefined) => {
      ended = true;
    },
  });
  let handedOut = 0;
  for (const { kind, bytes } of itemsIn(input)) {
    if (ended) break;
    const what = kind % 8;
    if (what === STORE) store(frontEnd, bytes);
    else if (what === KICK) frontEnd.kick(FIRST_FD + ((bytes[0] ?? 0) % Math.max(1, handedOut)));
    else if (what === FORBID) for (const gfn of bytes) toggle(gate.forbidden, gfn % 32);
    else {
      const fds = Array.from({ length: what === GO_ON ? 0 : what }, () => frontEnd.newFd());
      handedOut += fds.length;
      if (bytes.length) frontEnd.raw(bytes, fds);
      else for (const fd of fds) frontEnd.ports.fds.close(fd);
    }
    check(gate.open === 0, "a DMA window is left open");
  }
  if (!leaks) disk.close();
  // What was never received is not the session's to close.
  check(frontEnd.open.size === frontEnd.unread, "an fd is left open");
}

function toggle(set: Set<number>, member: number): void {
  if (!set.delete(member)) set.add(member);
}

function store(frontEnd: FrontEnd, bytes: Uint8Array): void {
  if (bytes.length < 4) return;
  const gpa = new DataView(bytes.buffer, bytes.byteOffset).getUint32(0, true);
  try {
    frontEnd.memory.write(gpa, bytes.subarray(4));
  } catch (error) {
    if (!(error instanceof NotGuestRam)) throw error;
  }
}

// --- pieces -------------------------------------------------------------------------------------------------------------

const { VhostUserHeader: Header, VhostUserU64: U64, VringState, VringAddr } = wire;
const RING = layoutAt(0x1000, 16);
const u64 = (value: number | bigint) => U64.encode({ value: BigInt(value) });

function message(request: number, payload: Uint8Array = new Uint8Array(0), fds = 0, flags = 9): Uint8Array {
  return items.encode(
    fds,
    new Uint8Array([...Header.encode({ request, flags, size: payload.length }), ...payload]),
  );
}
const stored = (gpa: number, bytes: Uint8Array): Uint8Array =>
  items.encode(STORE, Uint8Array.of(gpa, gpa >> 8, gpa >> 16, gpa >> 24, ...bytes));

const FEATURES = (1n << BigInt(VIRTIO_F_VERSION_1)) | (1n << BigInt(wire.VHOST_USER_F_PROTOCOL_FEATURES));
const region = (gpa: number, size: number, offset: number) => ({
  gpa,
  size,
  userAddress: USER_ADDRESS + gpa,
  mmapOffset: offset,
});

/** All that a VMM says until the ring runs: what is left out or changed makes a session of another kind. */
const opening = (): Uint8Array[] => [
  message(wire.VHOST_USER_GET_FEATURES),
  message(wire.VHOST_USER_SET_PROTOCOL_FEATURES, u64(0x229)),
  message(wire.VHOST_USER_SET_FEATURES, u64(FEATURES)),
  message(wire.VHOST_USER_SET_MEM_TABLE, memoryTable(region(0, RAM_SIZE, 0)), 1),
  message(wire.VHOST_USER_SET_VRING_NUM, VringState.encode({ index: 0, num: 16 })),
  message(wire.VHOST_USER_SET_VRING_BASE, VringState.encode({ index: 0, num: 0 })),
  message(
    wire.VHOST_USER_SET_VRING_ADDR,
    VringAddr.encode({
      descriptor: USER_ADDRESS + RING.desc,
      available: USER_ADDRESS + RING.driver,
      used: USER_ADDRESS + RING.device,
    }),
  ),
  message(wire.VHOST_USER_SET_VRING_KICK, u64(0), 1),
  message(wire.VHOST_USER_SET_VRING_CALL, u64(0), 1),
  message(wire.VHOST_USER_SET_VRING_ENABLE, VringState.encode({ index: 0, num: 1 })),
];

function anyMessage(next: Next): Uint8Array {
  const request = next(27);
  const num = [0, 1, 16, next(2 ** 16)][next(4)]!;
  const payload = [
    new Uint8Array(0),
    u64(num),
    VringState.encode({ index: next(8) ? 0 : 1, num }),
    memoryTable(
      ...Array.from({ length: next(3) }, () => region(4096 * next(32), 4096 * next(33), 4096 * next(32))),
    ),
    wire.ConfigHead.encode({ offset: next(64), size: next(64) }, next(64)),
  ][next(5)]!;
  return message(request, payload, next(3), next(8) ? 9 : next(16));
}

/** A virtio-blk request of three descriptors, in the first entries of the ring. */
function request(next: Next): Uint8Array[] {
  const write = next(2) * 2;
  const chain = [
    { addr: 0x8000, len: 16, flags: 1, next: 1 },
    { addr: 4096 * next(33) + next(2) * next(4096), len: 512 * (1 + next(16)), flags: 1 | write, next: 2 },
    { addr: 0x9000, len: 1, flags: 2, next: next(4) },
  ];
  const type = [0, 1, 4, 8, next(256)][next(5)]!;
  return [
    ...chain.map((desc, i) => stored(RING.desc + 16 * i, Desc.encode(desc))),
    stored(0x8000, VirtioBlkReqHead.encode({ type, sector: next(SECTORS + 4) })),
    stored(RING.driver, Uint8Array.of(0, 0, 1 + next(17), 0, 0, 0, next(4), 0)),
    items.encode(KICK, Uint8Array.of(1)),
  ];
}

function piece(next: Next): Uint8Array {
  const parts = [
    opening,
    () => request(next),
    () => [anyMessage(next)],
    () => [items.encode(FORBID, Uint8Array.of(next(32)))],
  ];
  const joined = parts[[0, 1, 1, 1, 2, 2, 2, 3][next(8)]!]!();
  return new Uint8Array(joined.flatMap((part) => [...part]));
}

const KINDS = [
  "message, 0 fds",
  "message, 1 fd",
  "message, 2 fds",
  "message, 3 fds",
  "store",
  "kick",
  "forbid",
  "more",
];

export const vhostUserTarget = (leaks = false): Target => ({
  name: "vhost-user",
  run: (input) => run(input, leaks),
  piece,
  boundaries: items.boundaries,
  explain: (input) =>
    itemsIn(input).map(({ kind, bytes }) => `${KINDS[kind % 8]}: ${Buffer.from(bytes).toString("hex")}`),
});
