import assert from "node:assert/strict";
import test from "node:test";
import { addressOf, ramRegion } from "../../test/support/guest.ts";
import { active, idle, machine, RAM_FRAMES } from "../../test/support/machine.ts";
import { TU_PINNED as P } from "../wire/dtt.ts";
import {
  VIRTIO_IOMMU_S_FAULT as FAULT,
  VIRTIO_IOMMU_S_IOERR as IOERR,
  VIRTIO_IOMMU_S_NOMEM as NOMEM,
  VIRTIO_IOMMU_S_OK as OK,
} from "../wire/virtio-iommu.ts";

const frames = (first: number, count: number) => Array.from({ length: count }, (_, i) => first + i);

// --- pinning ------------------------------------------------------------------------------------------------------

test("a request pins each of its frames once, however often it names them, and at the address of the frame", () => {
  const m = active();
  const status = m.tracker.pin([
    { gfn: 5, nrFrames: 3 },
    { gfn: 6, nrFrames: 3 },
    { gfn: 5, nrFrames: 1 },
  ]);
  assert.equal(status, OK);
  assert.deepEqual([...m.pinner.pages.values()].sort(), [5, 6, 7, 8].map(addressOf));
  assert.deepEqual(m.held(4, 5, 6, 7, 8, 9), [false, true, true, true, true, false]);
});

test("frames that are pinned already count as done", () => {
  const m = active();
  m.tracker.pin([{ gfn: 5, nrFrames: 2 }]);
  m.pinner.pagesMax = 3;
  assert.equal(m.tracker.pin([{ gfn: 4, nrFrames: 4 }]), IOERR, "4 and 7 are new");
  assert.equal(m.tracker.pin([{ gfn: 4, nrFrames: 3 }]), OK, "4 alone is new");
  assert.equal(m.tracker.pinned, 3);
});

test("P is set only after the page is pinned, and after every page of the request is", () => {
  const m = active();
  const seen: number[] = [];
  m.pinner.before = () => seen.push(m.table.word(5), m.table.word(6));
  m.tracker.pin([{ gfn: 5, nrFrames: 2 }]);
  assert.deepEqual(seen, [0, 0, 0, 0]);
  assert.deepEqual([m.table.word(5), m.table.word(6)], [P, P]);
});

test("P is set for a frame that is in the ledger but whose P the guest cleared", () => {
  const m = active();
  m.tracker.pin([{ gfn: 5, nrFrames: 1 }]);
  m.table.set(5, 1);
  assert.equal(m.tracker.pin([{ gfn: 5, nrFrames: 1 }]), OK);
  assert.deepEqual([m.table.word(5), m.pinner.pages.size], [P + 1, 1]);
});

for (let failing = 1; failing <= 4; failing++)
  test(`all or nothing: the host refuses page ${failing} of 4, and no page, P or IOMMU entry is left`, () => {
    const m = active();
    m.map(100);
    m.pinner.pagesMax = failing;
    assert.equal(m.map(...frames(5, 4)), IOERR);
    assert.deepEqual(m.held(100, 5, 6, 7, 8), [true, false, false, false, false]);
    assert.deepEqual(
      frames(5, 4).map((gfn) => m.table.word(gfn) & P),
      [0, 0, 0, 0],
    );
    assert.equal(m.tracker.pinned, 1);
    m.pinner.pagesMax = 5;
    assert.equal(m.tracker.pin([{ gfn: 5, nrFrames: 4 }]), OK, "and the same request works later");
  });

test("a host that is out of memory is asked again after an unpin of all that is idle", () => {
  const m = active();
  idle(m, 1, 2);
  m.pinner.pagesMax = 2;
  assert.equal(m.map(3, 4), OK);
  assert.deepEqual(m.held(1, 2, 3, 4), [false, false, true, true]);
});

test("a host error other than ENOMEM is answered at once, without an unpin", () => {
  const m = active();
  idle(m, 1, 2);
  m.pinner.pagesMax = 2;
  m.pinner.errno = "EFAULT";
  assert.equal(m.map(3), IOERR);
  assert.deepEqual(m.held(1, 2, 3), [true, true, false]);
});

test("a forged P of a frame that was never pinned does not make it count as pinned", () => {
  const m = active();
  m.table.set(5, P);
  assert.equal(m.pass(), 1);
  assert.deepEqual([m.table.word(5), m.tracker.pinned], [P, 0]);
  assert.equal(m.tracker.pin([{ gfn: 5, nrFrames: 1 }]), OK);
  assert.deepEqual(m.held(5), [true]);
});

test("a frame without a unit fails the whole request with FAULT", () => {
  const m = active();
  assert.equal(
    m.tracker.pin([
      { gfn: 5, nrFrames: 1 },
      { gfn: 2 ** 19 - 1, nrFrames: 0 },
    ]),
    OK,
  );
  const upper = machine({ regions: [ramRegion(0, RAM_FRAMES), ramRegion(2 ** 33, 4)] });
  upper.activate();
  assert.equal(
    upper.tracker.pin([
      { gfn: 6, nrFrames: 1 },
      { gfn: 2 ** 21, nrFrames: 1 },
    ]),
    FAULT,
  );
  assert.deepEqual(upper.held(6), [false]);
});

// --- quota ----------------------------------------------------------------------------------------------------------

test("the quota is a limit of frames pinned at once", () => {
  const m = active({ quota: 4 });
  assert.equal(m.map(...frames(0, 4)), OK);
  assert.equal(m.map(4), NOMEM);
  assert.deepEqual([m.tracker.pinned, m.held(4)], [4, [false]]);
  m.unmap(0);
  assert.equal(m.tracker.pin([{ gfn: 4, nrFrames: 1 }]), OK, "after an unpin pass that is tried first");
  assert.deepEqual(m.held(0, 1, 4), [false, true, true]);
});

test("a request above the quota is refused also when everything else is idle", () => {
  const m = active({ quota: 4 });
  idle(m, 100, 101);
  assert.equal(m.map(...frames(0, 5)), NOMEM);
  assert.equal(m.table.word(0) & P, 0);
});

test("a request that names a frame often uses the quota once for it", () => {
  const m = active({ quota: 2 });
  const five = { gfn: 5, nrFrames: 1 };
  assert.equal(m.tracker.pin([five, five, five, { gfn: 6, nrFrames: 1 }]), OK);
  assert.equal(m.tracker.pinned, 2);
});

test("frames of a request that were pinned and uncounted may be unpinned for it, and are pinned again by it", () => {
  const m = active({ quota: 3 });
  idle(m, 1, 2, 3);
  // The driver breaks the rules: it asks for frames that it did not count.
  assert.equal(
    m.tracker.pin([
      { gfn: 1, nrFrames: 1 },
      { gfn: 4, nrFrames: 2 },
    ]),
    OK,
  );
  assert.deepEqual(m.held(1, 2, 3, 4, 5), [true, false, false, true, true]);
});

test("while unpinning is parked, nothing is unpinned for a request either", () => {
  const m = active({ quota: 2 });
  idle(m, 1, 2);
  m.tracker.park();
  assert.equal(m.map(3), NOMEM);
  m.tracker.unpark();
  assert.equal(m.tracker.pin([{ gfn: 3, nrFrames: 1 }]), OK);
});
