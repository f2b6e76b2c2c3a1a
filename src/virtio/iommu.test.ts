import assert from "node:assert/strict";
import test from "node:test";
import { ramRegion } from "../../test/support/guest.ts";
import { machine, RAM_FRAMES, TABLE_FRAME } from "../../test/support/machine.ts";
import type { Bdf, Gpa } from "../base/units.ts";
import {
  Config,
  PIN_CONTROL_OFF as OFF,
  PIN_CONTROL_ON as ON,
  PIN_CONTROL_PARK as PARK,
  PinRange,
  ReqPin,
  ReqProbe,
  PIN_CONTROL_UNPARK as UNPARK,
} from "../wire/virtio-iommu.ts";
import { DriverQueue, layoutAt } from "./driver-queue.ts";
import { VirtioIommu } from "./iommu.ts";
import { type Buffer, SplitQueue } from "./queue.ts";

const bit = (n: number) => 1n << BigInt(n);
const BYPASS = bit(3);
const PROBE = bit(4);
const BYPASS_CONFIG = bit(6);
const PIN_PAGE = bit(16);
const VERSION_1 = bit(32);
const NEGOTIATED = VERSION_1 | PROBE | BYPASS_CONFIG | PIN_PAGE;

const OK = 0;
const IOERR = 1;
const UNSUPP = 2;
const INVAL = 4;
const RANGE = 5;
const NOENT = 6;
const FAULT = 7;
const NOMEM = 8;

const DISK = 0x20;
const BITMAP = 1900 * 4096;
const REQUEST = 0x2_0000;
const REPLY = 0x3_0000;
/** A frame of RAM that the table has no leaf for. */
const NO_LEAF = 1500;

type Field = keyof typeof Config.fields;

/** The device over a real tracker and a fake host, and its driver. Frames 0 to 1,023 have units. */
function rig(options: Parameters<typeof machine>[0] & { pinPage?: boolean } = {}) {
  const m = machine(options);
  m.table.unit(0);
  const device = new VirtioIommu({
    memory: m.memory,
    tracker: m.tracker,
    assigned: new Set([DISK as Bdf, 0x103 as Bdf]),
    pinPage: options.pinPage ?? true,
  });
  const layout = layoutAt(0x1_0000, 64);
  const driver = new DriverQueue(m.memory, layout);
  const queue = new SplitQueue(m.memory, layout, { indirect: true });
  const { fields } = Config;
  const get = (name: Field): number => {
    const raw = new Uint8Array(fields[name].size);
    device.configRead(fields[name].at, raw);
    return Number(
      Buffer.from([...raw].reverse())
        .toString("hex")
        .replace(/^/, "0x"),
    );
  };
  const set = (name: Field, value: number): void =>
    device.configWrite(
      fields[name].at,
      Config.encode({ [name]: value })
        .slice(fields[name].at)
        .subarray(0, fields[name].size),
    );

  const send = (request: Uint8Array, readable: readonly Buffer[], writable: readonly Buffer[]) => {
    let done = 0;
    for (const { gpa, length } of readable) {
      m.memory.write(gpa, request.subarray(done, done + length));
      done += length;
    }
    driver.add(readable, writable);
    device.kick(0, queue);
    const { written } = driver.poll()!;
    let left = written;
    const reply = writable.flatMap(({ gpa, length }) => {
      const part = new Uint8Array(Math.min(left, length));
      m.memory.read(gpa, part);
      left -= part.length;
      return [...part];
    });
    return { written, reply };
  };
  /** Send a request in one buffer, with room for `room` bytes of answer; returns the answer's status byte. */
  const status = (request: Uint8Array, room = 4): number => {
    const { written, reply } = send(request, [buffer(REQUEST, request.length)], [buffer(REPLY, room)]);
    assert.deepEqual([written, ...reply.slice(1)], [4, 0, 0, 0]);
    return reply[0]!;
  };
  return {
    ...m,
    device,
    driver,
    queue,
    get,
    set,
    send,
    status,
    pin: (...gfns: number[]) => status(pinRequest(gfns.map((gfn) => [gfn, 1]))),
    /** A driver's way to PIN on. Returns pin_status. */
    on({
      features = NEGOTIATED,
      root = m.table.root as number,
      levels = 2,
      bitmap = BITMAP,
      flags = 1,
    } = {}): number {
      device.start(features);
      set("assignedBitmap", bitmap);
      set("dttRoot", root);
      set("dttLevels", levels);
      set("pinFlags", flags);
      set("pinControl", ON);
      return get("pinStatus");
    },
    assigned(): number[] {
      const raw = new Uint8Array(8192);
      m.memory.read(BITMAP, raw);
      return [...raw.entries()].flatMap(([i, byte]) =>
        [0, 1, 2, 3, 4, 5, 6, 7].filter((b) => byte & (1 << b)).map((b) => 8 * i + b),
      );
    },
  };
}
const active = (options: Parameters<typeof rig>[0] = {}) => {
  const r = rig(options);
  assert.equal(r.on(), 1);
  return r;
};
const buffer = (gpa: number, length: number): Buffer => ({ gpa: gpa as Gpa, length });

function pinRequest(
  ranges: readonly (readonly [gfn: number, nrFrames: number, reserved?: number])[],
  head = {},
) {
  const request = ReqPin.encode(
    { type: 0x40, endpoint: DISK, nrRanges: ranges.length, ...head },
    PinRange.size * ranges.length,
  );
  for (const [i, [gfn, nrFrames, reserved = 0]] of ranges.entries())
    PinRange.write(request, { gfn, nrFrames, reserved }, ReqPin.size + i * PinRange.size);
  return request;
}

// --- features and configuration -------------------------------------------------------------------------------------

test("the offered features are VERSION_1, PROBE, BYPASS_CONFIG and, when wanted, PIN_PAGE", () => {
  assert.equal(rig().device.features, NEGOTIATED);
  assert.equal(rig({ pinPage: false }).device.features, NEGOTIATED & ~PIN_PAGE);
});

for (const [features, ok] of [
  [VERSION_1, true],
  [VERSION_1 | BYPASS_CONFIG | PIN_PAGE, true],
  [VERSION_1 | BYPASS | PIN_PAGE, true],
  [VERSION_1 | PIN_PAGE, false],
  [VERSION_1 | PROBE | PIN_PAGE, false],
] as const)
  test(`features 0x${features.toString(16)} are ${ok ? "accepted" : "refused: PIN_PAGE needs a bypass feature"}`, () =>
    assert.equal(rig().device.accepts(features), ok));

test("the configuration at reset: bypass, 4 KiB pages, all addresses, room for PROBE, the limits of PIN", () => {
  const { device } = rig({ quota: 1000 });
  const raw = new Uint8Array(96);
  device.configRead(0, raw);
  const { pageSizeMask, inputStart, inputEnd, probeSize, bypass, pinBatchMax, pinQuota, pinStatus } =
    Config.read(raw);
  assert.deepEqual(
    { pageSizeMask, inputStart, inputEnd, probeSize, bypass, pinBatchMax, pinQuota, pinStatus },
    {
      pageSizeMask: 0xffff_ffff_ffff_f000n,
      inputStart: 0n,
      inputEnd: 0xffff_ffff_ffff_ffffn,
      probeSize: 64,
      bypass: 1,
      pinBatchMax: 128,
      pinQuota: 1000n,
      pinStatus: 0,
    },
  );
  assert.equal(rig().get("pinQuota"), 2 ** 64, "no limit is all ones");
  assert.equal(rig({ pinPage: false }).get("pinBatchMax"), 0);
});

for (const features of [0n, VERSION_1 | BYPASS_CONFIG])
  test(`without PIN_PAGE (features 0x${features.toString(16)}) writes to its configuration are ignored`, () => {
    const r = rig();
    assert.equal(r.on({ features }), 0);
    assert.deepEqual([r.get("dttRoot"), r.get("dttLevels"), r.get("assignedBitmap")], [0, 0, 0]);
    assert.deepEqual([r.tracker.active, r.assigned()], [false, []]);
  });

test("bypass is 0 or 1, and writable with BYPASS_CONFIG only", () => {
  const r = rig();
  r.set("bypass", 0);
  assert.equal(r.get("bypass"), 1);
  r.device.start(VERSION_1 | BYPASS_CONFIG);
  r.set("bypass", 2);
  assert.equal(r.get("bypass"), 1);
  r.set("bypass", 0);
  assert.equal(r.get("bypass"), 0);
});

test("what the device says is not the driver's to write", () => {
  const r = active();
  const fixed: Field[] = [
    "pageSizeMask",
    "inputEnd",
    "domainEnd",
    "probeSize",
    "pinStatus",
    "pinBatchMax",
    "pinQuota",
  ];
  const before = fixed.map(r.get);
  for (const name of fixed)
    r.device.configWrite(Config.fields[name].at, new Uint8Array(Config.fields[name].size).fill(0x5a));
  assert.deepEqual(fixed.map(r.get), before);
});

test("the assigned bitmap has the bits of the assigned functions, and is written when its address is complete", () => {
  const r = rig();
  r.device.start(NEGOTIATED);
  const address = Config.encode({ assignedBitmap: BITMAP }).subarray(64, 72);
  for (let i = 0; i < 7; i++) {
    r.device.configWrite(64 + i, address.subarray(i, i + 1));
    assert.deepEqual(r.assigned(), []);
  }
  r.device.configWrite(71, address.subarray(7, 8));
  assert.deepEqual(r.assigned(), [DISK, 0x103]);
});

test("a 64-bit address whose low half names a page of the guest is not acted upon before the high half", () => {
  const r = rig({ regions: [ramRegion(0, RAM_FRAMES), ramRegion(2 ** 32, 4)] });
  r.device.start(NEGOTIATED);
  const address = Config.encode({ assignedBitmap: 2 ** 32 }).subarray(64, 72);
  r.memory.write(0, new Uint8Array(8192).fill(0x77));
  r.device.configWrite(64, address.subarray(0, 4));
  r.device.configWrite(68, address.subarray(4));
  assert.ok(r.memory.regions[0]!.bytes.subarray(0, 8192).every((b) => b === 0x77));
  assert.equal(r.memory.regions[1]!.bytes[DISK / 8], 1);
});

for (const bitmap of [BITMAP + 512, (RAM_FRAMES - 1) * 4096, 2 ** 40, 2 ** 52, 2 ** 63])
  test(`a bitmap at 0x${bitmap.toString(16)} is not written`, () => {
    const r = rig();
    const before = r.memory.regions[0]!.bytes.slice();
    r.device.start(NEGOTIATED);
    r.set("assignedBitmap", bitmap);
    assert.ok(Buffer.from(r.memory.regions[0]!.bytes).equals(before));
  });

// --- pin_control --------------------------------------------------------------------------------------------------------

test("PIN on: pin_status is 1, the bitmap is filled, the tracker is tracking", () => {
  const r = rig();
  assert.equal(r.on(), 1);
  assert.deepEqual([r.tracker.life, r.assigned()], ["tracked", [DISK, 0x103]]);
});

const ROOT = TABLE_FRAME * 4096;
for (const [what, wrong] of [
  ["a root within a page", { root: ROOT + 8 }],
  ["a root outside RAM", { root: 2 ** 30 }],
  ["a root beyond 2^52", { root: 2 ** 60 }],
  ["no levels", { levels: 0 }],
  ["six levels", { levels: 6 }],
  ["255 levels", { levels: 255 }],
  ["a bitmap within a page", { bitmap: BITMAP + 8 }],
  ["a bitmap of which the second page is not RAM", { bitmap: (RAM_FRAMES - 1) * 4096 }],
  ["a bitmap outside RAM", { bitmap: 2 ** 40 }],
  ["unknown flags", { flags: 3 }],
] as const)
  test(`PIN on with ${what} leaves the device off, and pin_status says INVAL`, () => {
    const r = rig();
    assert.equal(r.on(wrong), 0x80 + INVAL);
    assert.deepEqual([r.tracker.active, r.tracker.life], [false, "undecided"]);
    assert.equal(r.pin(1), UNSUPP);
    assert.equal(r.on(), 1, "and a correct PIN on works");
  });

test("PIN on with addresses of all ones is refused, and writes nothing to page 0", () => {
  const r = rig();
  r.device.start(NEGOTIATED);
  r.memory.write(0, new Uint8Array(8192).fill(0x77));
  const ones = new Uint8Array(8).fill(0xff);
  r.device.configWrite(Config.fields.assignedBitmap.at, ones);
  r.device.configWrite(Config.fields.dttRoot.at, ones);
  r.set("dttLevels", 2);
  r.set("pinControl", ON);
  assert.ok(
    r.memory.regions[0]!.bytes.subarray(0, 8192).every((b) => b === 0x77),
    "page 0 was overwritten",
  );
  assert.equal(r.get("pinStatus"), 0x80 + INVAL);
});

test("PIN off stops serving; what is pinned stays pinned", () => {
  const r = active();
  assert.equal(r.pin(1), OK);
  r.set("pinControl", OFF);
  assert.deepEqual([r.get("pinStatus"), r.tracker.life, r.pin(2)], [0, "frozen", UNSUPP]);
  assert.deepEqual(r.held(1), [true]);
});

test("parks nest: unpinning goes on after as many unparks", () => {
  const r = active();
  const control = (command: number) => {
    r.set("pinControl", command);
    return [r.get("pinStatus"), r.tracker.parked];
  };
  assert.deepEqual(control(PARK), [2, true]);
  assert.deepEqual(control(PARK), [2, true]);
  assert.deepEqual(control(UNPARK), [2, true]);
  assert.deepEqual(control(UNPARK), [1, false]);
  assert.deepEqual(control(UNPARK), [1, false], "one too many changes nothing");
  assert.deepEqual(control(PARK), [2, true], "and does not count against the next park");
});

for (const command of [PARK, UNPARK])
  test(`pin_control ${command} while off is refused with UNSUPP`, () => {
    const r = rig();
    r.device.start(NEGOTIATED);
    r.set("pinControl", command);
    assert.equal(r.get("pinStatus"), 0x80 + UNSUPP);
  });

for (const command of [4, 0x80, 0xff])
  test(`pin_control ${command} is refused with INVAL, and changes nothing`, () => {
    const r = active();
    r.set("pinControl", command);
    assert.deepEqual([r.get("pinStatus"), r.tracker.active], [0x80 + INVAL, true]);
    assert.equal(r.pin(1), OK);
  });

test("a reset freezes the guest: nothing is unpinned, and PIN has to be turned on again", () => {
  const r = active();
  r.pin(1, 2);
  r.device.reset();
  assert.deepEqual(
    [r.tracker.life, r.get("pinStatus"), r.get("dttRoot"), r.pin(1)],
    ["frozen", 0, 0, UNSUPP],
  );
  assert.deepEqual(r.held(1, 2), [true, true]);
  assert.equal(r.on(), 1);
});

// --- PIN request: the table of abi.md section 3 ---------------------------------------------------------------------------

interface PinCase {
  readonly what: string;
  readonly status: number;
  readonly request: Uint8Array;
  readonly options?: Parameters<typeof rig>[0];
  readonly prepare?: (r: ReturnType<typeof rig>) => void;
}
const many = (n: number) => Array.from({ length: n }, (_, i) => [i, 1] as const);
const pinCases: PinCase[] = [
  { status: OK, what: "one frame", request: pinRequest([[7, 1]]) },
  {
    status: OK,
    what: "several ranges",
    request: pinRequest([
      [7, 3],
      [100, 20],
      [5, 1],
    ]),
  },
  { status: OK, what: "as many ranges as pin_batch_max", request: pinRequest(many(128)) },
  {
    status: OK,
    what: "frames twice",
    request: pinRequest([
      [7, 3],
      [8, 3],
      [7, 1],
    ]),
  },
  { status: OK, what: "the last frame of a leaf", request: pinRequest([[1023, 1]]) },
  {
    status: IOERR,
    what: "the host is out of memory",
    request: pinRequest([[7, 3]]),
    prepare: (r) => {
      r.pinner.pagesMax = 2;
    },
  },
  {
    status: IOERR,
    what: "the host's device is gone",
    request: pinRequest([[7, 3]]),
    prepare: (r) => {
      r.pinner.pagesMax = 0;
      r.pinner.errno = "ENODEV";
    },
  },
  {
    status: UNSUPP,
    what: "PIN_PAGE was not negotiated",
    request: pinRequest([[7, 1]]),
    prepare: (r) => r.device.start(VERSION_1),
  },
  {
    status: UNSUPP,
    what: "pin_control is off",
    request: pinRequest([[7, 1]]),
    prepare: (r) => r.set("pinControl", OFF),
  },
  { status: INVAL, what: "no ranges", request: pinRequest([]) },
  { status: INVAL, what: "more ranges than pin_batch_max", request: pinRequest(many(129)) },
  { status: INVAL, what: "4 Gi ranges", request: pinRequest([[7, 1]], { nrRanges: 0xffff_ffff }) },
  {
    status: INVAL,
    what: "an empty range",
    request: pinRequest([
      [7, 1],
      [9, 0],
    ]),
  },
  { status: INVAL, what: "a reserved word of a range", request: pinRequest([[7, 1, 1]]) },
  {
    status: INVAL,
    what: "reserved bytes of the head",
    request: pinRequest([[7, 1]], { headReserved: Uint8Array.of(0, 0, 1) }),
  },
  { status: INVAL, what: "flags", request: pinRequest([[7, 1]], { flags: 0x8000_0000 }) },
  { status: INVAL, what: "fewer ranges than it says", request: pinRequest([[7, 1]], { nrRanges: 2 }) },
  {
    status: INVAL,
    what: "more ranges than it says",
    request: pinRequest(
      [
        [7, 1],
        [8, 1],
      ],
      { nrRanges: 1 },
    ),
  },
  { status: INVAL, what: "half a range", request: pinRequest([[7, 1]]).subarray(0, 24) },
  { status: INVAL, what: "half a fixed part", request: pinRequest([[7, 1]]).subarray(0, 12) },
  { status: INVAL, what: "a head alone", request: pinRequest([[7, 1]]).subarray(0, 4) },
  {
    status: RANGE,
    what: "a frame beyond RAM",
    request: pinRequest([
      [7, 1],
      [RAM_FRAMES, 1],
    ]),
  },
  {
    status: RANGE,
    what: "a range that runs out of RAM",
    request: pinRequest([
      [RAM_FRAMES - 600, 1],
      [RAM_FRAMES - 1, 2],
    ]),
    prepare: (r) => r.table.unit(2000),
  },
  { status: RANGE, what: "a frame beyond 2^40", request: pinRequest([[2 ** 40, 1]]) },
  {
    status: RANGE,
    what: "a frame of 2^63, to which adding 1 changes nothing",
    request: pinRequest([[2 ** 63, 1]]),
  },
  {
    status: RANGE,
    what: "a range of 4 Gi frames",
    request: pinRequest([[7, 0xffff_ffff]]),
    prepare: (r) => r.table.unit(2000),
  },
  {
    status: NOENT,
    what: "a function that is not assigned",
    request: pinRequest([[7, 1]], { endpoint: 0x21 }),
  },
  { status: NOENT, what: "another PCI segment", request: pinRequest([[7, 1]], { endpoint: 0x1_0020 }) },
  {
    status: FAULT,
    what: "a frame without a leaf",
    request: pinRequest([
      [7, 1],
      [NO_LEAF, 1],
    ]),
  },
  { status: NOMEM, what: "frames above the quota", request: pinRequest([[7, 3]]), options: { quota: 2 } },
];
for (const { what, status, request, options = {}, prepare } of pinCases)
  test(`PIN status ${status}: ${what}`, () => {
    const r = active(options);
    r.table.map(0);
    assert.equal(r.pin(0), OK);
    const before = r.tracker.pinned;
    prepare?.(r);
    assert.equal(r.status(request), status);
    if (status === OK) return;
    assert.equal(r.tracker.pinned, before, "nothing is newly pinned");
    assert.deepEqual(r.held(0, 7, 8, 9, 100), [true, false, false, false, false]);
    assert.deepEqual([r.table.word(7), r.table.word(8)], [0, 0], "P stays clear");
  });

test("OK means that every frame is pinned and its P set", () => {
  const r = active();
  assert.equal(
    r.status(
      pinRequest([
        [7, 2],
        [1023, 1],
      ]),
    ),
    OK,
  );
  assert.deepEqual(r.held(7, 8, 9, 1023), [true, true, false, true]);
  assert.deepEqual(
    [7, 8, 9, 1023].map((gfn) => r.table.word(gfn)),
    [2 ** 31, 2 ** 31, 0, 2 ** 31],
  );
});

// --- requests in general -----------------------------------------------------------------------------------------------------

test("a request and its answer may be split over descriptors at any boundary", () => {
  for (const cuts of [[1], [3], [5, 6, 15], [16], [17, 31], Array.from({ length: 31 }, (_, i) => i + 1)]) {
    const r = active();
    const request = pinRequest([[7, 1]]);
    const edges = [0, ...cuts, request.length];
    // Each part in its own place, also at odd addresses.
    const readable = edges.slice(1).map((end, i) => buffer(REQUEST + 101 * i, end - edges[i]!));
    const writable = [buffer(REPLY, 1), buffer(REPLY + 33, 0), buffer(REPLY + 65, 2), buffer(REPLY + 97, 1)];
    assert.deepEqual(r.send(request, readable, writable), { written: 4, reply: [0, 0, 0, 0] });
    assert.deepEqual(r.held(7), [true]);
  }
});

test("more room than the tail needs is left as it is", () => {
  const r = active();
  r.memory.write(REPLY, new Uint8Array(16).fill(0xee));
  assert.equal(r.status(pinRequest([[7, 1]]), 16), OK);
  const reply = new Uint8Array(16);
  r.memory.read(REPLY, reply);
  assert.deepEqual([...reply], [0, 0, 0, 0, ...new Array(12).fill(0xee)]);
});

for (const [what, request, readable, writable] of [
  ["an unknown type", Uint8Array.of(0x41, 0, 0, 0, 0, 0, 0, 0), 8, 16],
  ["type 0", new Uint8Array(64), 64, 16],
  ["half a head", Uint8Array.of(0x40, 0, 0), 3, 4],
  ["no readable part", new Uint8Array(0), 0, 4],
  ["no writable part", pinRequest([[7, 1]]), 32, 0],
  ["half a tail", pinRequest([[7, 1]]), 32, 3],
] as const)
  test(`${what}: used length 0, and the buffer is untouched`, () => {
    const r = active();
    r.memory.write(REPLY, new Uint8Array(16).fill(0xee));
    const { written } = r.send(
      request,
      readable ? [buffer(REQUEST, readable)] : [],
      writable ? [buffer(REPLY, writable)] : readable ? [] : [buffer(REPLY, 0)],
    );
    const reply = new Uint8Array(16);
    r.memory.read(REPLY, reply);
    assert.equal(written, 0);
    assert.ok(reply.every((b) => b === 0xee));
    assert.equal(r.device.badRequests, 1);
  });

for (const [what, readable, writable] of [
  ["a request outside RAM", buffer(2 ** 40, 32), buffer(REPLY, 4)],
  ["a request at 2^64 - 16", buffer(2 ** 64 - 2048, 32), buffer(REPLY, 4)],
  ["a request of which half is RAM", buffer(RAM_FRAMES * 4096 - 16, 32), buffer(REPLY, 4)],
  ["an answer outside RAM", buffer(REQUEST, 32), buffer(2 ** 40, 4)],
] as const)
  test(`${what} is counted and given back with length 0; the queue lives on`, () => {
    const r = active();
    r.memory.write(REQUEST, pinRequest([[7, 1]]));
    r.driver.add([readable], [writable]);
    r.device.kick(0, r.queue);
    assert.equal(r.driver.poll()?.written, 0);
    assert.equal(r.device.badRequests, 1);
    assert.equal(r.pin(8), OK);
  });

test("a request of 4 GiB is not read as a whole: its sizes do not add up", () => {
  const r = active();
  const { reply } = r.send(pinRequest([[7, 1]]), [buffer(REQUEST, 0xffff_ffff)], [buffer(REPLY, 4)]);
  assert.deepEqual(reply, [INVAL, 0, 0, 0]);
});

test("a malformed chain is given back with length 0, and the requests behind it are served", () => {
  const r = active();
  r.driver.describe(63, { addr: REQUEST, len: 32, flags: 1, next: 63 });
  r.driver.offer(63);
  r.memory.write(REQUEST + 512, pinRequest([[7, 1]]));
  r.driver.add([buffer(REQUEST + 512, 32)], [buffer(REPLY, 4)]);
  r.device.kick(0, r.queue);
  assert.deepEqual(r.driver.poll(), { head: 63, written: 0 });
  assert.equal(r.driver.poll()?.written, 4);
  assert.deepEqual([r.held(7), r.device.badRequests], [[true], 1]);
});

for (const [name, type] of [
  ["ATTACH", 1],
  ["DETACH", 2],
  ["MAP", 3],
  ["UNMAP", 4],
] as const)
  test(`${name} is not offered: UNSUPP`, () => {
    const request = new Uint8Array(36);
    request[0] = type;
    assert.equal(active().status(request), UNSUPP);
  });

test("nothing happens on the event queue", () => {
  const r = active();
  r.driver.add([], [buffer(REPLY, 24)]);
  r.device.kick(1, r.queue);
  assert.equal(r.driver.poll(), undefined);
});

// --- PROBE -----------------------------------------------------------------------------------------------------------------------

const probe = (endpoint: number) => ReqProbe.encode({ type: 5, endpoint });

test("PROBE of an assigned function: the MSI window is reserved", () => {
  const { written, reply } = rig().send(probe(DISK), [buffer(REQUEST, 72)], [buffer(REPLY, 68)]);
  const resvMem = "01001400010000000000e0fe00000000ffffeffe00000000";
  assert.equal(written, 68);
  assert.equal(Buffer.from(reply).toString("hex"), resvMem.padEnd(2 * 68, "0"));
});

test("PROBE's properties and tail are found when the driver gives them in separate buffers", () => {
  const writable = [buffer(REPLY, 63), buffer(REPLY + 100, 1), buffer(REPLY + 200, 4)];
  const { written, reply } = rig().send(probe(0x21), [buffer(REQUEST, 72)], writable);
  assert.deepEqual([written, reply.at(64)], [68, NOENT]);
});

for (const endpoint of [0, 0x21, 0x1_0020, 0xffff_ffff])
  test(`PROBE of endpoint 0x${endpoint.toString(16)}, which is not assigned: NOENT, without properties`, () => {
    const { reply } = rig().send(probe(endpoint), [buffer(REQUEST, 72)], [buffer(REPLY, 68)]);
    assert.deepEqual(reply, [...new Array(64).fill(0), NOENT, 0, 0, 0]);
  });

for (const [what, length, room] of [
  ["short", 71, 68],
  ["without room for the properties", 72, 67],
] as const)
  test(`a PROBE that is ${what} is answered with INVAL`, () =>
    assert.equal(rig().status(probe(DISK).subarray(0, length), room), INVAL));
