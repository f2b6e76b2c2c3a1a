import assert from "node:assert/strict";
import test from "node:test";
import { FakeClock } from "../../test/support/clock.ts";
import { InvariantViolation } from "../base/errors.ts";
import { type Gfn, milliseconds } from "../base/units.ts";
import { SharedWords } from "../memory/shared-words.ts";
import { createIommuBuffer, DEVICES_MAX, DeviceGate, SoftwareIommu } from "./software-iommu.ts";

const FRAMES = 4096;
const frame = (gfn: number) => gfn as Gfn;

function rig({ answer = (_: Gfn) => false }: { answer?: (gfn: Gfn) => boolean } = {}) {
  const buffer = createIommuBuffer(FRAMES);
  const clock = new FakeClock(0, 1000);
  const iommu = new SoftwareIommu(buffer, clock);
  const gates = Array.from(
    { length: DEVICES_MAX },
    (_, device) => new DeviceGate(buffer, device, () => iommu.serveRequests(answer)),
  );
  return { buffer, clock, iommu, gates, gate: gates[0]! };
}

test("a frame is allowed from allow() to revoke(), and no other frame with it", () => {
  const { iommu, gate } = rig();
  const allowed = () =>
    Array.from({ length: FRAMES }, (_, gfn) => gfn).filter((gfn) => gate.allows(frame(gfn)));
  assert.deepEqual(allowed(), []);
  const gfns = [0, 31, 32, 63, FRAMES - 1];
  for (const gfn of gfns) iommu.allow(frame(gfn));
  assert.deepEqual(allowed(), gfns);
  iommu.revoke(frame(32));
  assert.deepEqual(allowed(), [0, 31, 63, FRAMES - 1]);
});

test("frames beyond the table are never allowed, and cannot be", () => {
  const { iommu, gate } = rig();
  for (const gfn of [FRAMES, 2 ** 32, 2 ** 32 + 1, 2 ** 52]) {
    assert.equal(gate.allows(frame(gfn)), false);
    assert.throws(() => iommu.allow(frame(gfn)), InvariantViolation);
  }
  iommu.allow(frame(0));
  assert.equal(gate.allows(frame(2 ** 37)), false, "frame numbers are not cut to 32 bits");
});

test("open: every DMA is allowed, and closing it leaves what was allowed", () => {
  const { iommu, gate } = rig();
  iommu.allow(frame(5));
  iommu.setOpen(true);
  assert.deepEqual(
    [gate.allows(frame(5)), gate.allows(frame(6)), gate.allows(frame(2 ** 40))],
    [true, true, true],
  );
  iommu.setOpen(false);
  assert.deepEqual([gate.allows(frame(5)), gate.allows(frame(6))], [true, false]);
});

test("a device whose thread has ended keeps no window open, asks for nothing and masters no bus; its successor may", () => {
  const { iommu, gate } = rig();
  gate.setMastering(true);
  gate.enter();
  const access = iommu.access(0);
  assert.equal(iommu.quiesce(), false);
  iommu.deviceEnded(0);
  assert.deepEqual([iommu.quiesce(), iommu.isMastering(0)], [true, false]);
  assert.notEqual(iommu.access(0), access, "what it had asked for in an access is not held any more");
  iommu.deviceEnded(0);
  assert.equal(iommu.quiesce(), true, "one that had no window open has none opened");
  gate.enter();
  assert.equal(iommu.quiesce(), false);
  gate.leave();
  assert.equal(iommu.quiesce(), true);
});

test("quiesce is true when no window is open", () => {
  const { iommu, gates, clock } = rig();
  assert.equal(iommu.quiesce(), true);
  for (const gate of gates) {
    gate.enter();
    gate.leave();
  }
  assert.equal(iommu.quiesce(), true);
  assert.equal(clock.time, 0, "and does not wait");
});

for (const device of [0, DEVICES_MAX - 1])
  test(`quiesce is false when device ${device} keeps its window open longer than the limit of 2 ms`, () => {
    const { iommu, gates, clock } = rig();
    gates[device]!.enter();
    assert.equal(iommu.quiesce(), false);
    assert.ok(clock.time > milliseconds(2) && clock.time < milliseconds(3));
    gates[device]!.leave();
    assert.equal(iommu.quiesce(), true);
  });

test("quiesce waits for a window to close", () => {
  const { iommu, gate, clock } = rig();
  gate.enter();
  let looks = 0;
  clock.now = () => {
    if (++looks === 5) gate.leave();
    return milliseconds(0);
  };
  assert.equal(iommu.quiesce(), true);
  assert.equal(looks, 5);
});

test("quiesce does not wait for a window that was opened after it began", () => {
  const { iommu, gate, clock } = rig();
  gate.enter();
  let looks = 0;
  clock.now = () => {
    if (++looks === 2) {
      gate.leave();
      gate.enter(); // sees what was revoked
    }
    return milliseconds(0);
  };
  assert.equal(iommu.quiesce(), true);
});

test("each device says for itself whether it may do DMA", () => {
  const buffer = createIommuBuffer(64);
  const backend = new SoftwareIommu(buffer, new FakeClock());
  const gates = [0, 7].map((device) => new DeviceGate(buffer, device, () => {}));
  gates[1]!.setMastering(true);
  assert.deepEqual([backend.isMastering(0), backend.isMastering(7)], [false, true]);
  gates[0]!.setMastering(true);
  gates[1]!.setMastering(false);
  assert.deepEqual([backend.isMastering(0), backend.isMastering(7)], [true, false]);
});

test("a device's request is answered by the backend: granted, refused, and then again", () => {
  const asked: number[] = [];
  const { iommu, gates } = rig({
    answer: (gfn) => {
      asked.push(gfn);
      return gfn % 2 === 0;
    },
  });
  iommu.setGranting(true);
  const answers = [2, 3, 2, FRAMES - 1].map((gfn, i) => gates[i % 2]!.request(frame(gfn)));
  assert.deepEqual(answers, [true, false, true, false]);
  assert.deepEqual(asked, [2, 3, 2, FRAMES - 1]);
});

test("while nothing is granted, and beyond the table, the backend is not even asked", () => {
  let asked = 0;
  const { iommu, gate } = rig({
    answer: () => {
      asked++;
      return true;
    },
  });
  assert.equal(gate.request(frame(1)), false);
  iommu.setGranting(true);
  assert.equal(gate.request(frame(FRAMES)), false);
  iommu.setGranting(false);
  assert.equal(gate.request(frame(1)), false);
  assert.equal(asked, 0);
});

test("a backend that does not answer in time has refused, and does not answer that request later", (t) => {
  let asked = 0;
  const buffer = createIommuBuffer(FRAMES);
  const backend = new SoftwareIommu(buffer, new FakeClock());
  backend.setGranting(true);
  t.mock.method(SharedWords.prototype, "wait", () => "timed-out");
  assert.equal(new DeviceGate(buffer, 0, () => {}).request(frame(9)), false);
  backend.serveRequests(() => ++asked > 0);
  assert.equal(asked, 0);
});

test("each pending request is answered once", () => {
  const { iommu } = rig();
  let answered = 0;
  const answer = () => ++answered > 0;
  iommu.serveRequests(answer);
  const buffer = createIommuBuffer(FRAMES);
  const backend = new SoftwareIommu(buffer, new FakeClock());
  backend.setGranting(true);
  const gate = new DeviceGate(buffer, 3, () => {
    backend.serveRequests(answer);
    backend.serveRequests(answer);
  });
  assert.equal(gate.request(frame(9)), true);
  backend.serveRequests(answer);
  assert.equal(answered, 1);
});

test("a table for more frames than an entry can name is refused", () =>
  assert.throws(() => createIommuBuffer(2 ** 30 + 1), InvariantViolation));

test("there are as many devices as the table has places", () => {
  const { buffer } = rig();
  assert.throws(() => new DeviceGate(buffer, DEVICES_MAX, () => {}), InvariantViolation);
});
