/**
 * The bytes that QEMU 7.2 (`-device x-pci-proxy-dev`) sends and expects. Requests and replies are hex, as on the
 * wire: `i32 command, 4 bytes padding, u64 size`, then the payload.
 */
import assert from "node:assert/strict";
import test from "node:test";
import { PeerGone } from "../base/errors.ts";
import type { GuestRegion } from "../memory/guest-memory.ts";
import type { PciFunction } from "../virtio/device.ts";
import { type MessageSocket, MpqemuServer } from "./mpqemu.ts";

const bytesOf = (hex: string): Buffer =>
  Buffer.from(hex.replace(/(\d+)\*0/g, (_, n) => "00".repeat(Number(n))).replace(/[\s|]/g, ""), "hex");

/** A socket of which the peer's bytes are known; fds come with the first byte of the message they belong to. */
class FakeSocket implements MessageSocket {
  readonly sent: string[] = [];
  #at = 0;
  readonly #incoming: Buffer;
  readonly #fds: Map<number, readonly number[]>;
  /** `fds`: by the position in the stream of the byte they ride on. */
  constructor(incoming: Buffer, fds: [number, readonly number[]][]) {
    this.#incoming = incoming;
    this.#fds = new Map(fds);
  }
  get left(): number {
    return this.#incoming.length - this.#at;
  }
  receive(size: number): { bytes: Uint8Array; fds: readonly number[] } {
    if (this.left < size) throw new PeerGone("the peer closed the connection");
    const bytes = this.#incoming.subarray(this.#at, this.#at + size);
    const fds = [...this.#fds].flatMap(([at, some]) => (at >= this.#at && at < this.#at + size ? some : []));
    this.#at += size;
    return { bytes, fds };
  }
  send(bytes: Uint8Array): void {
    this.sent.push(Buffer.from(bytes).toString("hex"));
  }
}

/** A server with `stream` to serve, and a log of all that it asks of its ports. */
function server(stream: string, fds: [number, readonly number[]][] = [], mapFails = -1) {
  const log: string[] = [];
  const open = new Set(fds.flatMap(([, some]) => some));
  const socket = new FakeSocket(bytesOf(stream), fds);
  const close = (fd: number) => {
    assert.ok(open.delete(fd), `fd ${fd} is closed twice`);
  };
  const fn: PciFunction = {
    configRead(offset, size) {
      log.push(`configRead ${offset} ${size}`);
      return 0x1057_1af4;
    },
    configWrite: (...args) => void log.push(`configWrite ${args.join(" ")}`),
    barRead(address, size) {
      log.push(`barRead ${address} ${size}`);
      return 0x1122_3344_5566_7788n;
    },
    barWrite: (...args) => void log.push(`barWrite ${args.join(" ")}`),
    reset: () => void log.push("reset"),
  };
  let regions: readonly GuestRegion[] | undefined;
  const mpqemu = new MpqemuServer({
    socket,
    function: fn,
    map(fd, offset, size) {
      close(fd); // it takes the fd over
      if (fd === mapFails) throw new RangeError("cannot map");
      log.push(`map ${fd} ${offset} ${size}`);
      return { hostAddress: 1000 + fd, bytes: new Uint8Array(0) };
    },
    closeFd: close,
    memory(seen) {
      regions = seen;
    },
  });
  return { mpqemu, socket, log, open, regions: () => regions };
}

const RET = "01000000 | 4*0 | 0800000000000000";
const ERROR = "ffffffffffffffff";
const header = (command: string, size: string) => `${command}000000 | 4*0 | ${size}00000000000000`;

for (const [what, request, calls, reply] of [
  [
    "CFGREAD",
    `${header("03", "0c")} | 00000000 | 00000000 | 04000000`,
    ["configRead 0 4"],
    "f41a571000000000",
  ],
  [
    "CFGREAD of the last byte",
    `${header("03", "0c")} | ff0f0000 | 00000000 | 01000000`,
    ["configRead 4095 1"],
    "f41a571000000000",
  ],
  [
    "CFGWRITE",
    `${header("02", "0c")} | 10000000 | ffffffff | 04000000`,
    ["configWrite 16 4 4294967295"],
    "8*0",
  ],
  [
    "CFGWRITE of 2 bytes",
    `${header("02", "0c")} | 04000000 | 06000000 | 02000000`,
    ["configWrite 4 2 6"],
    "8*0",
  ],
  [
    "BAR_READ",
    `${header("05", "18")} | 1400bffe00000000 | 8*0 | 08000000 | 01 | 3*0`,
    ["barRead 4273930260 8"],
    "8877665544332211",
  ],
  [
    "BAR_READ at all ones",
    `${header("05", "18")} | ffffffffffffffff | 8*0 | 01000000 | 01 | 3*0`,
    ["barRead 18446744073709552000 1"],
    "8877665544332211",
  ],
  [
    "BAR_WRITE",
    `${header("04", "18")} | 0030bffe00000000 | ffffffffffffffff | 02000000 | 01 | 3*0`,
    ["barWrite 4273942528 2 18446744073709551615"],
    "8*0",
  ],
  ["DEVICE_RESET", header("07", "00"), ["reset"], "8*0"],
  ["CFGREAD of 0 bytes", `${header("03", "0c")} | 00000000 | 00000000 | 00000000`, [], ERROR],
  ["CFGREAD of 3 bytes", `${header("03", "0c")} | 00000000 | 00000000 | 03000000`, [], ERROR],
  ["CFGREAD of 8 bytes", `${header("03", "0c")} | 00000000 | 00000000 | 08000000`, [], ERROR],
  ["CFGREAD of -1 bytes", `${header("03", "0c")} | 00000000 | 00000000 | ffffffff`, [], ERROR],
  ["CFGREAD across the end", `${header("03", "0c")} | fd0f0000 | 00000000 | 04000000`, [], ERROR],
  ["CFGWRITE at 4 GiB - 1", `${header("02", "0c")} | ffffffff | 00000000 | 01000000`, [], ERROR],
  ["BAR_READ of 0 bytes", `${header("05", "18")} | 8*0 | 8*0 | 00000000 | 01 | 3*0`, [], ERROR],
  ["BAR_READ of 16 bytes", `${header("05", "18")} | 8*0 | 8*0 | 10000000 | 01 | 3*0`, [], ERROR],
  ["BAR_WRITE of 4 GiB - 1 bytes", `${header("04", "18")} | 8*0 | 8*0 | ffffffff | 01 | 3*0`, [], ERROR],
] as const)
  test(`${what}: one reply, byte for byte`, () => {
    const { mpqemu, socket, log } = server(request);
    mpqemu.serve();
    assert.deepEqual(socket.sent, [bytesOf(`${RET} | ${reply}`).toString("hex")]);
    assert.deepEqual(log, calls);
    assert.equal(socket.left, 0);
  });

test("messages are served one by one, in order, and counted", () => {
  const reset = header("07", "00");
  const { mpqemu, socket } = server(`${reset} ${reset} ${reset}`);
  for (const left of [32, 16, 0]) {
    mpqemu.serve();
    assert.equal(socket.left, left);
  }
  assert.deepEqual([mpqemu.messages, socket.sent.length], [3, 3]);
  assert.throws(() => mpqemu.serve(), { code: "ERR_COIOMMU_PEER_GONE" });
});

// --- memory ---------------------------------------------------------------------------------------------------------

const sysmem = `${header("00", "c0")}
  | 0000000000000000 0000000001000000 48*0
  | 0000000800000000 0000004000000000 48*0
  | 0000000000000000 0000000800000000 48*0`;

test("SYNC_SYSMEM: one region for each fd, mapped in order, without a reply", () => {
  const { mpqemu, socket, log, open, regions } = server(sysmem, [[0, [7, 8]]]);
  mpqemu.serve();
  assert.deepEqual(log, ["map 7 0 134217728", "map 8 134217728 1073741824"]);
  assert.deepEqual(regions(), [
    { gpa: 0, size: 0x0800_0000, hostAddress: 1007, bytes: new Uint8Array(0) },
    { gpa: 0x1_0000_0000, size: 0x4000_0000, hostAddress: 1008, bytes: new Uint8Array(0) },
  ]);
  assert.deepEqual([open.size, socket.sent], [0, []]);
});

test("SYNC_SYSMEM without fds: there is no RAM", () => {
  const { mpqemu, regions } = server(sysmem);
  mpqemu.serve();
  assert.deepEqual(regions(), []);
});

test("a region that cannot be mapped: the fds after it are closed, and the memory map stays", () => {
  const { mpqemu, open, regions } = server(sysmem, [[0, [7, 8, 9]]], 8);
  assert.throws(() => mpqemu.serve(), RangeError);
  assert.deepEqual([open.size, regions()], [0, undefined]);
});

test("SYNC_SYSMEM with 9 fds is refused, and all are closed", () => {
  const { mpqemu, open, log } = server(sysmem, [[0, [1, 2, 3, 4, 5, 6, 7, 8, 9]]]);
  assert.throws(() => mpqemu.serve(), { code: "ERR_COIOMMU_PROTOCOL" });
  assert.deepEqual([open.size, log], [0, []]);
});

test("SET_IRQFD: both fds are closed, without a reply; this function raises no interrupt", () => {
  const { mpqemu, socket, open } = server(header("06", "00"), [[0, [7, 8]]]);
  mpqemu.serve();
  assert.deepEqual([open.size, socket.sent], [0, []]);
});

test("fds that come with a message that wants none, or with its payload, are closed", () => {
  const read = `${header("03", "0c")} | 00000000 | 00000000 | 04000000`;
  for (const position of [0, 16, 20]) {
    const { mpqemu, open } = server(read, [[position, [7, 8]]]);
    mpqemu.serve();
    assert.deepEqual([...open], [], `fds on byte ${position}`);
  }
});

// --- a broken stream ------------------------------------------------------------------------------------------------

for (const [what, stream] of [
  ["an unknown command", header("08", "00")],
  ["RET, which only we send", header("01", "08")],
  ["command -1", "ffffffff | 4*0 | 8*0"],
  ["CFGREAD with no payload", header("03", "00")],
  ["CFGREAD with too much payload", header("03", "0d")],
  ["BAR_READ with a payload of 2^64 - 1 bytes", "05000000 | 4*0 | ffffffffffffffff"],
  ["BAR_READ with a payload of 2^32 + 24 bytes", "05000000 | 4*0 | 1800000001000000"],
  ["SYNC_SYSMEM with half its arrays", header("00", "60")],
  ["DEVICE_RESET with a payload", header("07", "08")],
] as const)
  test(`${what}: the stream is broken, its fds are closed, nothing is served or answered`, () => {
    const { mpqemu, socket, log, open } = server(`${stream} | 200*0`, [[0, [7, 8]]]);
    assert.throws(() => mpqemu.serve(), { code: "ERR_COIOMMU_PROTOCOL" });
    assert.deepEqual([log, socket.sent, open.size, mpqemu.messages], [[], [], 0, 0]);
    assert.equal(socket.left, 200, "the payload is not even received");
  });

test("a peer that dies inside a message: PeerGone, and its fds are closed", () => {
  const { mpqemu, open } = server(`${header("00", "c0")} | 100*0`, [[0, [7]]]);
  assert.throws(() => mpqemu.serve(), { code: "ERR_COIOMMU_PEER_GONE" });
  assert.equal(open.size, 0);
});

test("an error of the function is not swallowed, and the fds are closed", () => {
  const { mpqemu, open, log } = server(header("07", "00"), [[0, [7]]]);
  log.push = () => {
    throw new RangeError("a bug");
  };
  assert.throws(() => mpqemu.serve(), RangeError);
  assert.equal(open.size, 0);
});
