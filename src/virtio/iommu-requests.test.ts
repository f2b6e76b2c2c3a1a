import assert from "node:assert/strict";
import test from "node:test";
import { RAM_FRAMES } from "../../test/support/machine.ts";
import {
  activeViommu,
  buffer,
  DISK,
  FAULT,
  FOREIGN,
  INVAL,
  IOERR,
  NOENT,
  NOMEM,
  OK,
  pinRequest,
  RANGE,
  REPLY,
  REQUEST,
  UNSUPP,
  VERSION_1,
  type Viommu,
  type ViommuOptions,
  viommu,
} from "../../test/support/viommu.ts";
import { PIN_CONTROL_OFF, ReqProbe } from "../wire/virtio-iommu.ts";

// --- PIN request: the table of abi.md section 3 ---------------------------------------------------------------------------

interface PinCase {
  readonly request: Uint8Array;
  readonly options?: ViommuOptions;
  /** What happens between PIN on and the request. */
  readonly before?: (r: Viommu) => void;
}
const many = (n: number) => Array.from({ length: n }, (_, i) => [i, 1] as const);
const one = (head: Parameters<typeof pinRequest>[1]) => pinRequest([[7, 1]], head);
const range = (...ranges: [gfn: number, nrFrames: number, reserved?: number][]) => pinRequest(ranges);
/** Gives frames 1,024 to 2,047 units, so that only RAM ends. */
const secondLeaf = (r: Viommu) => void r.table.unit(2000);
const host = (pagesMax: number, errno: string) => (r: Viommu) =>
  void Object.assign(r.pinner, { pagesMax, errno });

const pinCases: Record<number, Record<string, PinCase>> = {
  [OK]: {
    "one frame": { request: range([7, 1]) },
    "several ranges": { request: range([7, 3], [100, 20], [5, 1]) },
    "as many ranges as pin_batch_max": { request: pinRequest(many(128)) },
    "frames twice": { request: range([7, 3], [8, 3], [7, 1]) },
    "the last frame of a leaf": { request: range([1023, 1]) },
  },
  [IOERR]: {
    "the host is out of memory": { request: range([7, 3]), before: host(2, "ENOMEM") },
    "the host's device is gone": { request: range([7, 3]), before: host(0, "ENODEV") },
  },
  [UNSUPP]: {
    "PIN_PAGE was not negotiated": { request: range([7, 1]), before: (r) => r.device.start(VERSION_1) },
    "pin_control is off": { request: range([7, 1]), before: (r) => r.set("pinControl", PIN_CONTROL_OFF) },
  },
  [INVAL]: {
    "no ranges": { request: range() },
    "more ranges than pin_batch_max": { request: pinRequest(many(129)) },
    "4 Gi ranges": { request: one({ nrRanges: 0xffff_ffff }) },
    "an empty range": { request: range([7, 1], [9, 0]) },
    "a reserved word of a range": { request: range([7, 1, 1]) },
    "reserved bytes of the head": { request: one({ headReserved: Uint8Array.of(0, 0, 1) }) },
    flags: { request: one({ flags: 0x8000_0000 }) },
    "fewer ranges than it says": { request: one({ nrRanges: 2 }) },
    "more ranges than it says": {
      request: pinRequest(
        [
          [7, 1],
          [8, 1],
        ],
        { nrRanges: 1 },
      ),
    },
    "half a range": { request: range([7, 1]).subarray(0, 24) },
    "half a fixed part": { request: range([7, 1]).subarray(0, 12) },
    "a head alone": { request: range([7, 1]).subarray(0, 4) },
  },
  [RANGE]: {
    "a frame beyond RAM": { request: range([7, 1], [RAM_FRAMES, 1]) },
    "a range that runs out of RAM": { request: range([RAM_FRAMES - 1, 2]), before: secondLeaf },
    "a range of 4 Gi frames": { request: range([7, 0xffff_ffff]), before: secondLeaf },
    "more frames than there are": { request: range([0, 1024], [0, 1024], [0, 1024]) },
    "a frame beyond 2^40": { request: range([2 ** 40, 1]) },
    "a frame of 2^63, to which adding 1 changes nothing": { request: range([2 ** 63, 1]) },
  },
  [NOENT]: {
    "a function that is not assigned": { request: one({ endpoint: 0x21 }) },
    "another PCI segment": { request: one({ endpoint: 0x1_0020 }) },
  },
  [FAULT]: {
    "a frame without a leaf": { request: range([7, 1], [1500, 1]) },
  },
  [NOMEM]: {
    "frames above the quota": { request: range([7, 3]), options: { quota: 2 } },
  },
};
for (const [status, cases] of Object.entries(pinCases))
  for (const [what, { request, options = {}, before }] of Object.entries(cases))
    test(`PIN status ${status}: ${what}`, () => {
      const r = activeViommu(options);
      r.table.map(0);
      assert.equal(r.pin(0), OK);
      const pinned = r.tracker.pinned;
      before?.(r);
      assert.equal(r.status(request), Number(status));
      if (Number(status) === OK) return;
      assert.equal(r.tracker.pinned, pinned, "nothing is newly pinned");
      assert.deepEqual(r.held(0, 7, 8, 9, 100), [true, false, false, false, false]);
      assert.deepEqual([r.table.word(7), r.table.word(8)], [0, 0], "P stays clear");
    });

test("OK means that every frame is pinned and its P set", () => {
  const r = activeViommu();
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
    const r = activeViommu();
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
  const r = activeViommu();
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
    const r = activeViommu();
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
    const r = activeViommu();
    r.memory.write(REQUEST, pinRequest([[7, 1]]));
    r.driver.add([readable], [writable]);
    r.device.kick(0, r.queue);
    assert.equal(r.driver.poll()?.written, 0);
    assert.equal(r.device.badRequests, 1);
    assert.equal(r.pin(8), OK);
  });

test("a request of 4 GiB is not read as a whole: its sizes do not add up", () => {
  const r = activeViommu();
  const { reply } = r.send(pinRequest([[7, 1]]), [buffer(REQUEST, 0xffff_ffff)], [buffer(REPLY, 4)]);
  assert.deepEqual(reply, [INVAL, 0, 0, 0]);
});

test("a malformed chain is given back with length 0, and the requests behind it are served", () => {
  const r = activeViommu();
  r.driver.describe(63, { addr: REQUEST, len: 32, flags: 1, next: 63 });
  r.driver.offer(63);
  r.memory.write(REQUEST + 512, pinRequest([[7, 1]]));
  r.driver.add([buffer(REQUEST + 512, 32)], [buffer(REPLY, 4)]);
  r.device.kick(0, r.queue);
  assert.deepEqual(r.driver.poll(), { head: 63, written: 0 });
  assert.equal(r.driver.poll()?.written, 4);
  assert.deepEqual([r.held(7), r.device.badRequests], [[true], 1]);
});

test("a kick of the event queue with nothing to report does nothing", () => {
  const r = activeViommu();
  r.driver.add([], [buffer(REPLY, 24)]);
  r.device.kick(1, r.queue);
  assert.equal(r.driver.poll(), undefined);
});

// --- PROBE -----------------------------------------------------------------------------------------------------------------------

const probe = (endpoint: number) => ReqProbe.encode({ type: 5, endpoint });

for (const [what, request] of Object.entries({
  "an assigned function": probe(DISK),
  "a function behind another IOMMU": probe(FOREIGN),
  "an assigned function, with reserved bytes": ReqProbe.encode({
    ...{
      type: 5,
      endpoint: DISK,
      headReserved: Uint8Array.of(1, 2, 3),
      reserved: new Uint8Array(64).fill(9),
    },
  }),
}))
  test(`PROBE of ${what}: the MSI window is reserved, and nothing else`, () => {
    const { written, reply } = viommu().send(request, [buffer(REQUEST, 72)], [buffer(REPLY, 68)]);
    const resvMem = "01001400010000000000e0fe00000000ffffeffe00000000";
    assert.equal(written, 68);
    assert.equal(Buffer.from(reply).toString("hex"), resvMem.padEnd(2 * 68, "0"));
  });

test("PROBE's properties and tail are found when the driver gives them in separate buffers", () => {
  const writable = [buffer(REPLY, 63), buffer(REPLY + 100, 1), buffer(REPLY + 200, 4)];
  const { written, reply } = viommu().send(probe(0x21), [buffer(REQUEST, 72)], writable);
  assert.deepEqual([written, reply.at(64)], [68, NOENT]);
});

for (const endpoint of [0, 0x21, 0x1_0020, 0xffff_ffff])
  test(`PROBE of endpoint 0x${endpoint.toString(16)}, which is not assigned: NOENT, without properties`, () => {
    const { reply } = viommu().send(probe(endpoint), [buffer(REQUEST, 72)], [buffer(REPLY, 68)]);
    assert.deepEqual(reply, [...new Array(64).fill(0), NOENT, 0, 0, 0]);
  });

for (const [what, length, room] of [
  ["short", 71, 68],
  ["without room for the properties", 72, 67],
  ["without any room for properties", 72, 4],
] as const)
  test(`a PROBE that is ${what} is answered with INVAL behind the place of its properties, which are none`, () => {
    const request = probe(DISK).subarray(0, length);
    const { reply } = viommu().send(request, [buffer(REQUEST, length)], [buffer(REPLY, room)]);
    assert.deepEqual(reply, [...new Array(room - 4).fill(0), INVAL, 0, 0, 0]);
  });

test("PROBE with more room than probe_size: the tail follows probe_size bytes, and the rest is left as it is", () => {
  const { written, reply } = viommu().send(probe(0x21), [buffer(REQUEST, 72)], [buffer(REPLY, 0xffff_ffff)]);
  assert.deepEqual([written, reply.at(64)], [68, NOENT]);
});
