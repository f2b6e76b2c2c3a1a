import assert from "node:assert/strict";
import test from "node:test";
import { ramRegion } from "../../test/support/guest.ts";
import { RAM_FRAMES, TABLE_FRAME } from "../../test/support/machine.ts";
import {
  activeViommu,
  BITMAP,
  BYPASS,
  BYPASS_CONFIG,
  type ConfigField,
  DISK,
  FOREIGN,
  INVAL,
  NEGOTIATED,
  NIC,
  OK,
  PIN_DIRTY,
  PIN_PAGE,
  PROBE,
  UNSUPP,
  VERSION_1,
  viommu,
} from "../../test/support/viommu.ts";
import { TU_PINNED, TU_WRITABLE } from "../wire/dtt.ts";
import { VirtioPciCommonCfg } from "../wire/pci.ts";
import {
  Config,
  PIN_CONTROL_OFF as OFF,
  PIN_CONTROL_ON as ON,
  PIN_CONTROL_PARK as PARK,
  PIN_CONTROL_UNPARK as UNPARK,
} from "../wire/virtio-iommu.ts";
import { VirtioPciFunction } from "./pci.ts";

// --- features and configuration -------------------------------------------------------------------------------------

test("the offered features are those of remapping, PROBE and, when wanted, PIN_PAGE and PIN_DIRTY", () => {
  assert.equal(viommu().device.features, NEGOTIATED | PIN_DIRTY);
  assert.equal(viommu({ pinPage: false }).device.features, NEGOTIATED & ~PIN_PAGE);
});

for (const [features, ok] of [
  [VERSION_1, true],
  [VERSION_1 | BYPASS_CONFIG | PIN_PAGE, true],
  [VERSION_1 | BYPASS | PIN_PAGE, true],
  [VERSION_1 | PIN_PAGE, false],
  [VERSION_1 | PROBE | PIN_PAGE, false],
  [VERSION_1 | BYPASS_CONFIG | PIN_PAGE | PIN_DIRTY, true],
  [VERSION_1 | PIN_PAGE | PIN_DIRTY, false],
  [VERSION_1 | BYPASS_CONFIG | PIN_DIRTY, false],
] as const)
  test(`features 0x${features.toString(16)} are ${ok ? "accepted" : "refused: PIN_PAGE needs a bypass feature, and PIN_DIRTY needs it"}`, () =>
    assert.equal(viommu().device.accepts(features), ok));

test("the configuration at reset: bypass, 4 KiB pages, 52 bits of address, room for PROBE, the limits of PIN", () => {
  const { device } = viommu({ quota: 1000 });
  const raw = new Uint8Array(96);
  device.configRead(0, raw);
  const { pageSizeMask, inputStart, inputEnd, probeSize, bypass, pinBatchMax, pinQuota, pinStatus } =
    Config.read(raw);
  assert.deepEqual(
    { pageSizeMask, inputStart, inputEnd, probeSize, bypass, pinBatchMax, pinQuota, pinStatus },
    {
      pageSizeMask: 0xffff_ffff_ffff_f000n,
      inputStart: 0n,
      inputEnd: 2n ** 52n - 1n,
      probeSize: 64,
      bypass: 1,
      pinBatchMax: 128,
      pinQuota: 1000n,
      pinStatus: 0,
    },
  );
  assert.equal(viommu().get("pinQuota"), 2 ** 64, "no limit is all ones");
  assert.equal(viommu({ pinPage: false }).get("pinBatchMax"), 0);
});

for (const features of [0n, VERSION_1 | BYPASS_CONFIG])
  test(`without PIN_PAGE (features 0x${features.toString(16)}) writes to its configuration are ignored`, () => {
    const r = viommu();
    assert.equal(r.on({ features }), 0);
    assert.deepEqual([r.get("dttRoot"), r.get("dttLevels"), r.get("assignedBitmap")], [0, 0, 0]);
    assert.deepEqual([r.tracker.active, r.assigned()], [false, []]);
  });

test("bypass is 0 or 1, and writable with BYPASS_CONFIG only", () => {
  const r = viommu();
  r.set("bypass", 0);
  assert.equal(r.get("bypass"), 1);
  r.device.start(VERSION_1 | BYPASS_CONFIG);
  r.set("bypass", 2);
  assert.equal(r.get("bypass"), 1);
  r.set("bypass", 0);
  assert.equal(r.get("bypass"), 0);
});

test("bypass stays as it is over a device reset, and is 1 again after a machine reset; devices see it", () => {
  const r = activeViommu();
  r.table.map(5);
  assert.equal(r.pin(5), OK);
  r.set("bypass", 0);
  assert.deepEqual([r.gate.allows(5), r.otherGate.allows(5)], [false, false]);
  r.device.reset();
  assert.deepEqual([r.get("bypass"), r.gate.allows(5)], [0, false]);
  r.device.machineReset();
  assert.equal(r.get("bypass"), 1);
  assert.equal(r.on(), 1);
  assert.equal(r.pin(5), OK);
  assert.equal(r.gate.allows(5), true);
});

test("what the device says is not the driver's to write", () => {
  const r = activeViommu();
  const fixed: ConfigField[] = [
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
  const r = viommu();
  r.device.start(NEGOTIATED);
  const address = Config.encode({ assignedBitmap: BITMAP }).subarray(64, 72);
  for (let i = 0; i < 7; i++) {
    r.device.configWrite(64 + i, address.subarray(i, i + 1));
    assert.deepEqual(r.assigned(), []);
  }
  r.device.configWrite(71, address.subarray(7, 8));
  assert.deepEqual(r.assigned(), [DISK, NIC, FOREIGN]);
});

test("a 64-bit address whose low half names a page of the guest is not acted upon before the high half", () => {
  const r = viommu({ regions: [ramRegion(0, RAM_FRAMES), ramRegion(2 ** 32, 4)] });
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
    const r = viommu();
    const before = r.memory.regions[0]!.bytes.slice();
    r.device.start(NEGOTIATED);
    r.set("assignedBitmap", bitmap);
    assert.ok(Buffer.from(r.memory.regions[0]!.bytes).equals(before));
  });

// --- pin_control --------------------------------------------------------------------------------------------------------

test("PIN on: pin_status is 1, the bitmap is filled, the tracker is tracking", () => {
  const r = viommu();
  assert.equal(r.on(), 1);
  assert.deepEqual([r.tracker.life, r.assigned()], ["tracked", [DISK, NIC, FOREIGN]]);
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
    const r = viommu();
    assert.equal(r.on(wrong), 0x80 + INVAL);
    assert.deepEqual([r.tracker.active, r.tracker.life], [false, "undecided"]);
    assert.equal(r.pin(1), UNSUPP);
    assert.equal(r.on(), 1, "and a correct PIN on works");
  });

test("PIN on that is refused leaves the device off, also when it was on", () => {
  const r = activeViommu();
  assert.equal(r.on({ root: ROOT + 8 }), 0x80 + INVAL);
  assert.deepEqual([r.tracker.active, r.tracker.life, r.pin(1)], [false, "frozen", UNSUPP]);
});

test("PIN on with addresses of all ones is refused, and writes nothing to page 0", () => {
  const r = viommu();
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
  const r = activeViommu();
  assert.equal(r.pin(1), OK);
  r.set("pinControl", OFF);
  assert.deepEqual([r.get("pinStatus"), r.tracker.life, r.pin(2)], [0, "frozen", UNSUPP]);
  assert.deepEqual(r.held(1), [true]);
});

test("parks nest: unpinning goes on after as many unparks", () => {
  const r = activeViommu();
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

test("what the operator parks is no park of the guest's: pin_status is as without", () => {
  const r = activeViommu();
  r.tracker.parkByOperator(true);
  r.set("pinControl", PARK);
  assert.equal(r.get("pinStatus"), 2);
  r.set("pinControl", UNPARK);
  assert.deepEqual([r.get("pinStatus"), r.tracker.parked], [1, true]);
  r.set("pinControl", ON);
  assert.deepEqual([r.get("pinStatus"), r.tracker.parked], [1, true]);
});

test("pin_quota tells of a new quota, and the configuration has another generation then", () => {
  const r = activeViommu({ quota: 1000 });
  const pci = new VirtioPciFunction(r.device, r.memory);
  const generation = () => pci.barRead(VirtioPciCommonCfg.fields.configGeneration.at, 1);
  assert.deepEqual([r.get("pinQuota"), generation()], [1000, 0n]);
  r.tracker.setQuota(2 ** 33);
  r.device.quotaChanged();
  assert.deepEqual([r.get("pinQuota"), generation()], [2 ** 33, 1n]);
  pci.reset();
  assert.equal(r.get("pinQuota"), 2 ** 33, "a reset does not bring the old one back");
  r.tracker.setQuota(Number.POSITIVE_INFINITY);
  for (let i = 0; i < 255; i++) r.device.quotaChanged();
  assert.deepEqual([r.get("pinQuota"), generation()], [2 ** 64, 0n], "all ones, in a byte that wraps");
});

test("without PIN_PAGE there is no pin_quota to change", () => {
  const r = viommu({ pinPage: false });
  r.device.quotaChanged();
  assert.deepEqual([r.get("pinQuota"), r.device.configGeneration], [0, 0]);
});

for (const command of [PARK, UNPARK])
  test(`pin_control ${command} while off is refused with UNSUPP`, () => {
    const r = viommu();
    r.device.start(NEGOTIATED);
    r.set("pinControl", command);
    assert.equal(r.get("pinStatus"), 0x80 + UNSUPP);
  });

for (const command of [4, 0x80, 0xff])
  test(`pin_control ${command} is refused with INVAL, and changes nothing`, () => {
    const r = activeViommu();
    r.set("pinControl", command);
    assert.deepEqual([r.get("pinStatus"), r.tracker.active], [0x80 + INVAL, true]);
    assert.equal(r.pin(1), OK);
  });

test("a reset freezes the guest: nothing is unpinned, and PIN has to be turned on again", () => {
  const r = activeViommu();
  r.pin(1, 2);
  r.device.reset();
  assert.deepEqual(
    [r.tracker.life, r.get("pinStatus"), r.get("dttRoot"), r.pin(1)],
    ["frozen", 0, 0, UNSUPP],
  );
  assert.deepEqual(r.held(1, 2), [true, true]);
  assert.equal(r.on(), 1);
});

test("a machine reset releases the pins, and what the host refuses then is told", () => {
  const r = activeViommu();
  assert.equal(r.pin(1), OK);
  r.device.reset();
  r.device.machineReset();
  assert.deepEqual([r.tracker.life, r.tracker.pinned, r.held(1)], ["undecided", 0, [false]]);
  assert.deepEqual(r.hostErrors, []);
});

for (const [what, features, dirty] of [
  ["with PIN_DIRTY, D and W tell what devices may have written", NEGOTIATED | PIN_DIRTY, [6, 1]],
  ["without PIN_DIRTY, they tell nothing", NEGOTIATED, [5, 2]],
] as const)
  test(what, () => {
    const r = viommu();
    assert.equal(r.on({ features }), 1);
    r.tracker.dirty.start();
    assert.equal(r.map(5, 6), 0);
    r.table.set(6, TU_PINNED + TU_WRITABLE + 1);
    const { ranges } = r.tracker.dirty.harvest();
    assert.deepEqual([...ranges], dirty);
  });
