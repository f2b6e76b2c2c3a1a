import assert from "node:assert/strict";
import test from "node:test";
import { ram } from "../../test/support/guest.ts";
import { PIPE_OPCODES, PIPE_RECORDS, type PipeOpcode } from "../wire/pipe.ts";
import { PIPE_DRIVER, PipeServer, type Served } from "./pipe.ts";

const u16 = (n: number) => [n & 0xff, n >> 8];

/** A server of these records, with a log of all that it asks of its ports. */
function pipe(records: readonly (readonly [PipeOpcode, ...number[]])[]) {
  const stream = Uint8Array.from(
    records.flatMap(([opcode, ...bytes]) => [PIPE_OPCODES.indexOf(opcode), ...bytes]),
  );
  return pipeOf(stream);
}

function pipeOf(stream: Uint8Array) {
  const log: string[] = [];
  const noted =
    <T>(name: string, result: T) =>
    (...args: unknown[]): T => {
      log.push([name, ...args].join(" "));
      return result;
    };
  const memory = ram(16);
  let at = 0;
  const server = new PipeServer({
    read(size) {
      if (at + size > stream.length) return undefined;
      at += size;
      return stream.subarray(at - size, at);
    },
    function: {
      configRead: noted("configRead", 0),
      configWrite: noted("configWrite", undefined),
      barRead: noted("barRead", 0n),
      barWrite: noted("barWrite", undefined),
      reset: noted("reset", undefined),
    },
    memory,
    table: { build: noted("build", 2), map: noted("map", false), unmap: noted("unmap", undefined) },
    host: {
      memoryMap: noted("memoryMap", undefined),
      pass: noted("pass", undefined),
      advance: noted("advance", undefined),
      limitPins: noted("limitPins", undefined),
      limitReleases: noted("limitReleases", undefined),
      toggleWindow: noted("window", undefined),
      touch: noted("touch", undefined),
    },
  });
  const all = (): Served[] => {
    const served: Served[] = [];
    for (let record = server.serve(); record; record = server.serve()) served.push(record);
    return served;
  };
  return { server, memory, log, all };
}

const value = [0x44, 0x33, 0x22, 0x11, 0x88, 0x77, 0x66, 0x55];
for (const [record, call] of [
  [["configRead", 0x10, 0, 2], "configRead 16 4"],
  [["configRead", 0xff, 0x0f, 3], "configRead 4095 4"],
  [["configWrite", 4, 0, 1, ...value], "configWrite 4 2 287454020"],
  [["barRead", 0, 0x30, 0xfb], "barRead 12288 8"],
  [["barWrite", 0xff, 0xff, 3, ...value], `barWrite 65535 8 ${0x5566_7788_1122_3344n}`],
  [["machineReset"], "reset"],
  [["memoryMap", 0x5a], "memoryMap 10 5"],
  [["pinControl", 3], "barWrite 8273 1 3"],
  [["unmap", 7, 1], "unmap 263"],
  [["kick", 1], "barWrite 12292 2 1"],
  [["pass", 0], "pass Infinity"],
  [["pass", 3], "pass 3"],
  [["advance", 9], "advance 9"],
  [["hostPins", 4, 0], "limitPins 4 ENOMEM"],
  [["hostPins", 255, 1], "limitPins Infinity EPERM"],
  [["hostReleases", 0], "limitReleases 0"],
  [["window"], "window"],
  [["touch", 9, 0], "touch 9"],
] as const)
  test(`${record.join(" ")}: ${call}`, () => {
    const { all, log } = pipe([record]);
    all();
    assert.deepEqual(log, [call]);
  });

test("every byte begins a record, and every record may be cut short: that ends the program", () => {
  for (let byte = 0; byte < 256; byte++) {
    const size = PIPE_RECORDS[PIPE_OPCODES[byte % PIPE_OPCODES.length]!].size;
    for (let length = 0; length < size; length++)
      assert.deepEqual(
        pipeOf(new Uint8Array(1 + length).fill(byte, 0, 1)).all(),
        [],
        `${byte}, ${length} bytes`,
      );
    assert.equal(pipeOf(new Uint8Array(1 + size).fill(byte, 0, 1)).all().length, 1, `${byte}`);
  }
  assert.deepEqual(pipe([["write", 0, 0, 0, 0, 3, 1, 2]]).all(), [], "a tail that is too short");
  assert.deepEqual(pipe([["pin", 0, 0, 1, 5, 0]]).all(), [], "ranges that are too short");
});

test("the end of the stream is the end, not a record of its own", () =>
  assert.deepEqual(pipeOf(new Uint8Array(0)).all(), []));

test("a store of the guest lands in its RAM; one beside it is dropped", () => {
  const { all, memory } = pipe([
    ["write", 0x10, 0x20, 0, 0, 2, 0xaa, 0xbb],
    ["write", 0, 0, 0, 0xff, 1, 0xcc],
  ]);
  assert.equal(all().length, 2);
  assert.equal(memory.load16(0x2010), 0xbbaa);
});

test("start negotiates, and enables both queues where the driver keeps them", () => {
  const { all, log } = pipe([["start", 0]]);
  all();
  assert.deepEqual(log, [
    "barWrite 20 1 0",
    "barWrite 8 4 0",
    `barWrite 12 4 ${(1 << 16) | (1 << 6) | (1 << 4)}`,
    "barWrite 8 4 1",
    "barWrite 12 4 1",
    "barWrite 20 1 11",
    "barWrite 22 2 0",
    "barWrite 24 2 64",
    `barWrite 32 8 ${PIPE_DRIVER.queue}`,
    `barWrite 40 8 ${PIPE_DRIVER.queue + 1024}`,
    `barWrite 48 8 ${PIPE_DRIVER.queue + 1024 + 132}`,
    "barWrite 28 2 1",
    "barWrite 22 2 1",
    "barWrite 24 2 16",
    `barWrite 32 8 ${PIPE_DRIVER.eventQueue}`,
    `barWrite 40 8 ${PIPE_DRIVER.eventQueue + 256}`,
    `barWrite 48 8 ${PIPE_DRIVER.eventQueue + 256 + 36}`,
    "barWrite 28 2 1",
    "barWrite 20 1 15",
  ]);
});

test("pinOn builds the table and tells the device where it is", () => {
  const { all, log } = pipe([["pinOn", 0, 1]]);
  all();
  assert.deepEqual(log, [
    "build",
    `barWrite ${0x2000 + 64} 8 ${PIPE_DRIVER.bitmap}`,
    `barWrite ${0x2000 + 72} 8 ${PIPE_DRIVER.table}`,
    `barWrite ${0x2000 + 80} 1 2`,
    `barWrite ${0x2000 + 83} 1 1`,
    `barWrite ${0x2000 + 81} 1 1`,
  ]);
});

test("requests are offered one after the other, and kicked unless they are held", () => {
  const { all, memory } = pipe([
    ["start", 0],
    ["send", 1, 4, 2, 3, 0xa, 0xb, 0xc],
    ["pin", 0, 0, 1, ...u16(7), 2],
    ["map", ...u16(9)],
    ["send", 0, 0, 0, 0],
  ]);
  const [, held, pin, map, empty] = all();
  const head = memory.load16(PIPE_DRIVER.queue + 1024 + 4);
  assert.deepEqual([held!.sent, held!.kicked], [[head], false]);
  assert.deepEqual([pin!.sent.length, pin!.kicked, map!.sent.length, map!.kicked], [1, true, 1, true]);
  assert.deepEqual([empty!.sent, empty!.kicked], [[], false], "a request of no bytes is none");
  const request = new Uint8Array(32);
  memory.read(PIPE_DRIVER.requests + 256, request);
  assert.equal(
    Buffer.from(request).toString("hex"),
    `40000000 20000000 00000000 01000000 0700000000000000 02000000 00000000`.replaceAll(" ", ""),
  );
});

test("a driver with a full queue waits, and one without memory sends nothing", () => {
  const records = [
    ["start", 0],
    ...Array.from({ length: 30 }, () => ["send", 1, 1, 0, 1, 0] as const),
  ] as const;
  assert.equal(
    pipe(records)
      .all()
      .flatMap((r) => r.sent).length,
    20,
  );
  const { all, memory } = pipe(records);
  memory.setRegions([]);
  assert.deepEqual(
    all().flatMap((r) => r.sent),
    [],
  );
});
