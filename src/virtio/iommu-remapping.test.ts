/** ATTACH, DETACH, MAP and UNMAP: VIRTIO 1.2 section 5.13.6. docs/abi.md says which test is for which sentence. */
import assert from "node:assert/strict";
import test from "node:test";
import { RAM_FRAMES } from "../../test/support/machine.ts";
import {
  activeViommu,
  BYPASS_CONFIG,
  DEVERR,
  DISK,
  FOREIGN,
  INVAL,
  MAP_UNMAP,
  NIC,
  NOENT,
  NOMEM,
  OK,
  RANGE,
  UNSUPP,
  VERSION_1,
  type Viommu,
  type ViommuOptions,
  viommu,
} from "../../test/support/viommu.ts";
import { ReqAttach, ReqDetach, ReqMap, ReqUnmap } from "../wire/virtio-iommu.ts";

const ALL_ONES = 2n ** 64n - 1n;
const page = (n: number | bigint) => BigInt(n) * 4096n;

type Value<T> = T extends { encode(value: infer V): unknown } ? V : never;
const attachRequest = (value: Value<typeof ReqAttach> = {}) =>
  ReqAttach.encode({ type: 1, domain: 7, endpoint: DISK, ...value });
const detachRequest = (value: Value<typeof ReqDetach> = {}) =>
  ReqDetach.encode({ type: 2, domain: 7, endpoint: DISK, ...value });
/** Pages 100 to 102 to frames 5 to 7. */
const mapRequest = (value: Value<typeof ReqMap> = {}) =>
  ReqMap.encode({
    ...{ type: 3, domain: 7, virtStart: page(100), virtEnd: page(103) - 1n, physStart: 5 * 4096, flags: 3 },
    ...value,
  });
const unmapRequest = (value: Value<typeof ReqUnmap> = {}) =>
  ReqUnmap.encode({ type: 4, domain: 7, virtStart: page(100), virtEnd: page(103) - 1n, ...value });

/** A driver without PIN that has negotiated everything else. */
function started(options: ViommuOptions = {}): Viommu {
  const r = viommu(options);
  r.device.start(VERSION_1 | MAP_UNMAP | BYPASS_CONFIG);
  return r;
}
/** The disk in domain 7, with its mapping. */
function mapped(options: ViommuOptions = {}): Viommu {
  const r = started(options);
  assert.equal(r.status(attachRequest()), OK);
  assert.equal(r.status(mapRequest()), OK);
  return r;
}
const reach = (r: Viommu, ...pages: number[]) => pages.map((p) => r.gate.translate(p, "write"));

// --- what goes well --------------------------------------------------------------------------------------------------

test("ATTACH, MAP, UNMAP, DETACH: the endpoint accesses what is mapped while it is mapped", () => {
  const r = mapped();
  assert.deepEqual([...reach(r, 99, 100, 102, 103, 5), r.tracker.pinned], [-1, 5, 7, -1, -1, 3]);
  assert.equal(r.status(unmapRequest()), OK);
  assert.deepEqual([...reach(r, 100, 102), r.tracker.pinned], [-1, -1, 0]);
  assert.equal(r.status(detachRequest()), OK);
  assert.equal(r.status(mapRequest()), NOENT, "the domain has ceased to exist");
});

test("DETACH of the last endpoint releases what its domain mapped", () => {
  const r = mapped();
  assert.equal(r.status(detachRequest()), OK);
  assert.deepEqual([...reach(r, 100, 5), r.tracker.pinned], [-1, -1, 0]);
});

test("a function behind another IOMMU is asked for in vain, and is not touched by bypass", () => {
  const r = started();
  assert.deepEqual(
    [r.status(attachRequest({ endpoint: FOREIGN })), r.status(detachRequest({ endpoint: FOREIGN }))],
    [UNSUPP, UNSUPP],
  );
  r.set("bypass", 0);
  assert.equal(r.get("bypass"), 0);
});

test("ATTACH moves an endpoint from another domain, as if by DETACH", () => {
  const r = mapped();
  assert.equal(r.status(attachRequest({ domain: 8 })), OK);
  assert.deepEqual([...reach(r, 100), r.tracker.pinned], [-1, 0]);
  assert.equal(r.status(mapRequest()), NOENT);
});

test("ATTACH attaches several endpoints to one domain", () => {
  const r = mapped();
  assert.equal(r.status(attachRequest({ endpoint: NIC })), OK);
  assert.equal(r.otherGate.translate(101, "write"), 6);
});

test("a bypass domain lets its endpoints reach pinned frames at their own addresses, also with bypass 0", () => {
  const r = mapped();
  r.set("bypass", 0);
  assert.equal(r.otherGate.allows(5), false);
  assert.equal(r.status(attachRequest({ domain: 9, endpoint: NIC, flags: 1 })), OK);
  assert.equal(r.otherGate.allows(5), true);
});

test("a range mapped without WRITE cannot be written, one without READ not be read", () => {
  const r = mapped();
  assert.equal(r.status(mapRequest({ virtStart: page(200), virtEnd: page(201) - 1n, flags: 1 })), OK);
  assert.equal(r.status(mapRequest({ virtStart: page(300), virtEnd: page(301) - 1n, flags: 2 })), OK);
  const seen = (p: number) => [r.gate.translate(p, "read"), r.gate.translate(p, "write")];
  assert.deepEqual(
    [seen(200), seen(300)],
    [
      [5, -1],
      [-1, 5],
    ],
  );
});

test("a frame stays pinned while the table or a domain needs it", () => {
  const r = activeViommu();
  assert.equal(r.status(attachRequest()), OK);
  assert.equal(r.status(mapRequest()), OK);
  assert.equal(r.table.word(5), 0, "no P for a domain's sake");
  assert.equal(r.table.map(5), false);
  assert.equal(r.pin(5), OK);
  assert.equal(r.status(unmapRequest()), OK);
  assert.equal(r.tracker.pinned, 1);
});

test("a narrower input_range is told, kept over a reset, and MAP outside it refused; what is mapped stays", () => {
  const r = mapped();
  const generation = r.device.configGeneration;
  r.device.setInputRange({ start: page(101), end: page(201) - 1n });
  assert.notEqual(r.device.configGeneration, generation);
  const at = (first: number, last: number) =>
    r.status(mapRequest({ virtStart: page(first), virtEnd: page(last + 1) - 1n }));
  assert.deepEqual([at(99, 99), at(200, 201), at(201, 201), at(200, 200)], [RANGE, RANGE, RANGE, OK]);
  assert.deepEqual(reach(r, 100, 200), [5, 5]);
  r.device.reset();
  assert.deepEqual([r.get("inputStart"), r.get("inputEnd")], [101 * 4096, 201 * 4096 - 1]);
});

test("a device reset detaches all endpoints and keeps a tracked guest's frames pinned", () => {
  const r = activeViommu();
  assert.equal(r.status(attachRequest()), OK);
  assert.equal(r.status(mapRequest()), OK);
  r.device.reset();
  assert.deepEqual([r.tracker.life, r.tracker.pinned, ...reach(r, 100)], ["frozen", 3, -1]);
  r.device.machineReset();
  assert.equal(r.tracker.pinned, 0);
});

test("a device reset of a guest that was never tracked releases what its domains pinned", () => {
  const r = mapped();
  r.device.reset();
  assert.deepEqual([r.tracker.pinned, ...reach(r, 100)], [0, -1]);
});

// --- statuses -------------------------------------------------------------------------------------------------------------

const inMapped: Record<string, readonly [status: number, request: Uint8Array]> = {
  "ATTACH with a reserved byte": [INVAL, attachRequest({ reserved: Uint8Array.of(0, 0, 0, 1) })],
  "ATTACH with an unknown flag": [INVAL, attachRequest({ flags: 2 })],
  "ATTACH with the flag of bit 31": [INVAL, attachRequest({ flags: 0x8000_0000 })],
  "ATTACH of an endpoint that does not exist": [NOENT, attachRequest({ endpoint: 0x21 })],
  "ATTACH of an endpoint of another segment": [NOENT, attachRequest({ endpoint: 0x1_0020 })],
  "ATTACH with BYPASS to a domain that is none": [INVAL, attachRequest({ endpoint: NIC, flags: 1 })],
  "ATTACH that is short": [INVAL, attachRequest().subarray(0, 19)],
  "ATTACH with reserved bytes of the head": [OK, attachRequest({ headReserved: Uint8Array.of(1, 2, 3) })],
  "DETACH with reserved bytes": [OK, detachRequest({ reserved: new Uint8Array(8).fill(1) })],
  "DETACH of an endpoint that does not exist": [NOENT, detachRequest({ endpoint: 0x21 })],
  "DETACH from a domain that does not exist": [INVAL, detachRequest({ domain: 8 })],
  "DETACH of an endpoint that is not attached": [INVAL, detachRequest({ endpoint: NIC })],
  "DETACH that is short": [INVAL, detachRequest().subarray(0, 19)],
  "MAP of a start within a page": [RANGE, mapRequest({ virtStart: page(200) + 1n, virtEnd: page(201) - 1n })],
  "MAP of an end within a page": [RANGE, mapRequest({ virtStart: page(200), virtEnd: page(201) - 2n })],
  "MAP to a frame's middle": [
    RANGE,
    mapRequest({ virtStart: page(200), virtEnd: page(201) - 1n, physStart: 0x5800 }),
  ],
  "MAP over a mapping": [INVAL, mapRequest({ virtStart: page(102), virtEnd: page(104) - 1n })],
  "MAP with MMIO": [INVAL, mapRequest({ virtStart: page(200), virtEnd: page(201) - 1n, flags: 7 })],
  "MAP with the flag of bit 31": [INVAL, mapRequest({ flags: 0x8000_0003 })],
  "MAP in a domain that does not exist": [NOENT, mapRequest({ domain: 8 })],
  "MAP that ends before it begins": [INVAL, mapRequest({ virtStart: page(201), virtEnd: page(201) - 1n })],
  "MAP of all addresses": [RANGE, mapRequest({ virtStart: 0n, virtEnd: ALL_ONES })],
  "MAP of the last page of 64 bits": [RANGE, mapRequest({ virtStart: ALL_ONES - 4095n, virtEnd: ALL_ONES })],
  "MAP beyond input_range": [RANGE, mapRequest({ virtStart: 2n ** 52n - 4096n, virtEnd: 2n ** 52n + 4095n })],
  "MAP of the MSI window": [RANGE, mapRequest({ virtStart: 0xfee0_0000n, virtEnd: 0xfee0_0fffn })],
  "MAP that touches the MSI window's end": [
    RANGE,
    mapRequest({ virtStart: 0xfeef_f000n, virtEnd: 0xfef0_0fffn }),
  ],
  "MAP to a frame beyond RAM": [
    RANGE,
    mapRequest({ virtStart: page(200), virtEnd: page(201) - 1n, physStart: RAM_FRAMES * 4096 }),
  ],
  "MAP to the top of 64 bits": [
    RANGE,
    mapRequest({ virtStart: page(200), virtEnd: page(201) - 1n, physStart: 2 ** 64 - 4096 }),
  ],
  "MAP of more than there is RAM": [RANGE, mapRequest({ virtStart: page(200), virtEnd: 2n ** 51n - 1n })],
  "MAP that is short": [INVAL, mapRequest().subarray(0, 35)],
  "UNMAP of a part of a mapping": [RANGE, unmapRequest({ virtEnd: page(102) - 1n })],
  "UNMAP from within the first page of a mapping": [RANGE, unmapRequest({ virtStart: page(100) + 1n })],
  "UNMAP to within the last page of a mapping": [RANGE, unmapRequest({ virtEnd: page(103) - 2n })],
  "UNMAP with a reserved byte": [INVAL, unmapRequest({ reserved: Uint8Array.of(1) })],
  "UNMAP in a domain that does not exist": [NOENT, unmapRequest({ domain: 8 })],
  "UNMAP that ends before it begins": [INVAL, unmapRequest({ virtEnd: 0n })],
  "UNMAP that is short": [INVAL, unmapRequest().subarray(0, 27)],
};
for (const [what, [status, request]] of Object.entries(inMapped))
  test(`${what}: status ${status}`, () => {
    const r = mapped();
    assert.equal(r.status(request), status);
    if (status === OK) return;
    assert.deepEqual(reach(r, 100, 101, 102, 103, 200, 5), [5, 6, 7, -1, -1, -1], "nothing has changed");
    assert.equal(r.tracker.pinned, 3, "nothing is newly pinned, or released");
  });

for (const [what, virtStart, virtEnd] of [
  ["all addresses", 0n, ALL_ONES],
  ["a range with odd ends in holes", page(99) + 1n, page(104) + 5n],
  ["its own range", page(100), page(103) - 1n],
] as const)
  test(`UNMAP of ${what} removes the mapping`, () => {
    const r = mapped();
    assert.equal(r.status(unmapRequest({ virtStart, virtEnd })), OK);
    assert.deepEqual([...reach(r, 100, 101, 102), r.tracker.pinned], [-1, -1, -1, 0]);
  });

test("UNMAP of what is not mapped is OK and removes nothing", () => {
  const r = mapped();
  assert.equal(r.status(unmapRequest({ virtStart: page(200), virtEnd: ALL_ONES })), OK);
  assert.deepEqual(reach(r, 100, 102), [5, 7]);
});

test("MAP and UNMAP in a bypass domain are INVAL, and so is ATTACH to it without the flag", () => {
  const r = started();
  assert.equal(r.status(attachRequest({ flags: 1 })), OK);
  const statuses = [mapRequest(), unmapRequest(), attachRequest({ endpoint: NIC })].map((q) => r.status(q));
  assert.deepEqual(statuses, [INVAL, INVAL, INVAL]);
});

test("without BYPASS_CONFIG the flag BYPASS is unknown; without MAP_UNMAP, MAP and UNMAP are UNSUPP", () => {
  const r = viommu();
  r.device.start(VERSION_1);
  assert.equal(r.status(attachRequest({ flags: 1 })), INVAL);
  assert.equal(r.status(attachRequest()), OK);
  assert.deepEqual([r.status(mapRequest()), r.status(unmapRequest())], [UNSUPP, UNSUPP]);
});

test("MAP beyond the quota is NOMEM, and maps nothing", () => {
  const r = mapped({ quota: 4 });
  const request = mapRequest({ virtStart: page(200), virtEnd: page(202) - 1n, physStart: 9 * 4096 });
  assert.deepEqual([r.status(request), ...reach(r, 200), r.tracker.pinned], [NOMEM, -1, 3]);
});

test("UNMAP and DETACH while a device keeps a DMA window open are DEVERR, and change nothing", () => {
  const r = mapped();
  r.clock.step = 5e6;
  r.gate.enter();
  assert.deepEqual([r.status(unmapRequest()), r.status(detachRequest())], [DEVERR, DEVERR]);
  assert.deepEqual([...reach(r, 100), r.tracker.pinned], [5, 3]);
});
