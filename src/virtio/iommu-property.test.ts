/** The whole of VirtioIommu, Tracker and software IOMMU over a fake host, against the ABI's model (test/support/model.ts). */
import assert from "node:assert/strict";
import fc from "fast-check";
import { ramRegion } from "../../test/support/guest.ts";
import type { MachineOptions } from "../../test/support/machine.ts";
import { type Block, HostModel, type Range, type Status } from "../../test/support/model.ts";
import { commands, fails, holds } from "../../test/support/property.ts";
import { buffer, DISK, pinRequest, REPLY, REQUEST, type Viommu, viommu } from "../../test/support/viommu.ts";
import { HostError } from "../base/errors.ts";
import { type Gfn, gpaOf } from "../base/units.ts";
import { DmaTrackingTable, type Unit } from "../tracking/dtt.ts";

/** Blocks 1 and 2 come and go; the others hold the driver's queue, table and bitmap. Those below 256 are firmware's. */
const BLOCKS: readonly Block[] = [
  { first: 0, frames: 64 },
  { first: 128, frames: 16 },
  { first: 1024, frames: 16 },
  { first: 1536, frames: 16 },
  { first: 1900, frames: 2 },
];
/** Frames that are asked for: of three blocks, and beside them. */
const FRAMES = [0, 1, 63, 64, 128, 129, 143, 144, 1024, 1025, 1039, 1040];

interface Rig extends Viommu {
  backing: (number | undefined)[];
}
type Command = fc.Command<HostModel, Rig>;

const STATUS: readonly (Status | undefined)[] = [
  "OK",
  "IOERR",
  "UNSUPP",
  undefined,
  "INVAL",
  "RANGE",
  "NOENT",
  "FAULT",
  "NOMEM",
];

/** Do `run` to both, then compare all that can be seen. */
const command = (
  name: string,
  run: (m: HostModel, r: Rig) => void,
  check = (_: HostModel) => true,
): Command => ({
  check,
  run: (m, r) => {
    run(m, r);
    agree(m, r);
  },
  toString: () => name,
});

function agree(m: HostModel, r: Rig): void {
  const reachable = BLOCKS.flatMap((b) => Array.from({ length: b.frames + 1 }, (_, i) => b.first + i)).filter(
    (gfn) => r.gate.allows(gfn as Gfn),
  );
  assert.deepEqual(new Set(reachable), new Set(m.pins.keys()), "frames that the device may reach");
  const pages = new Set(r.pinner.pages.values());
  for (const gfn of reachable)
    assert.ok(pages.has(r.memory.hostAddress(gpaOf(gfn as Gfn))), "the host has pinned it");
  // A host that does not release keeps what the rest of an extent was pinned by, once, beside what it is pinned by now.
  if (!m.releases) m.orphans = Math.max(m.orphans, r.pinner.pages.size - m.pins.size);
  assert.deepEqual([r.tracker.pinned, r.pinner.pages.size], [m.pages, m.pages], "pages pinned");
  assert.equal(r.counters.framesNow, m.pages, "framesNow");
  assert.ok(m.pins.size <= m.quota, "quota");
  for (const gfn of FRAMES) {
    const word = m.word(gfn);
    if (word !== undefined) assert.equal(r.table.word(gfn), word, `unit of frame ${gfn}`);
  }
}

// --- PIN requests -------------------------------------------------------------------------------------------------

/** What a malformed request gets wrong, and the statuses that say so. More than one applies: any may be given. */
const FLAWS = {
  "no ranges": { status: "INVAL", head: { nrRanges: 0 } },
  "129 ranges": { status: "INVAL", head: { nrRanges: 129 } },
  "a range too many": { status: "INVAL", head: { nrRanges: 5 } },
  flags: { status: "INVAL", head: { flags: 1 } },
  "a reserved byte": { status: "INVAL", head: { headReserved: Uint8Array.of(0, 0, 1) } },
  "another endpoint": { status: "NOENT", head: { endpoint: DISK + 1 } },
  "another segment": { status: "NOENT", head: { endpoint: DISK + 0x1_0000 } },
  "half a header": { status: "INVAL", length: 15 },
  "a byte too many": { status: "INVAL", length: 33 },
} as const;
type Flaw = keyof typeof FLAWS;

function send(r: Rig, ranges: readonly Range[], flaw?: Flaw): Status {
  const { head = {}, length }: { head?: object; length?: number } = flaw ? FLAWS[flaw] : {};
  const whole = pinRequest(
    ranges.map(({ gfn, nrFrames }) => [gfn, nrFrames]),
    head,
  );
  const request = length === undefined ? whole : new Uint8Array([...whole, 0]).subarray(0, length);
  const { written, reply } = r.send(request, [buffer(REQUEST, request.length)], [buffer(REPLY, 4)]);
  assert.deepEqual([written, reply.slice(1)], [4, [0, 0, 0]], "answer");
  return STATUS[reply[0]!]!;
}

const pin = (ranges: readonly Range[]) =>
  command(`pin(${ranges.map((r) => `${r.gfn}+${r.nrFrames}`)})`, (m, r) => {
    const got = send(r, ranges);
    assert.equal(got, m.pin(ranges), "status");
  });
const malformed = (flaw: Flaw, gfn: number) =>
  command(`malformed(${flaw})`, (m, r) => {
    const got = send(r, [{ gfn, nrFrames: 1 }], flaw);
    assert.equal(got, m.pinPage && m.on ? FLAWS[flaw].status : "UNSUPP", "status");
  });
const emptyRange = command("pin(1+0)", (m, r) => {
  const got = send(r, [{ gfn: 1, nrFrames: 0 }]);
  assert.equal(got, m.pinPage && m.on ? "INVAL" : "UNSUPP", "status");
});

// --- the guest -------------------------------------------------------------------------------------------------------

/** A driver's map, with its request when P is clear. */
const map = (gfn: number) =>
  command(
    `map(${gfn})`,
    (m, r) => {
      if (gfn >= 1024) m.secondLeaf = true;
      const word = m.word(gfn)!;
      m.setWord(gfn, (word + 1) | 0x4000_0000);
      if (r.table.map(gfn)) return;
      assert.ok(word < 0x8000_0000, "P");
      assert.equal(send(r, [{ gfn, nrFrames: 1 }]), m.pin([{ gfn, nrFrames: 1 }]), "status");
    },
    (m) => ((m.word(gfn) ?? 0) & 0xffff) < 9,
  );
const unmap = (gfn: number) =>
  command(
    `unmap(${gfn})`,
    (m, r) => {
      m.setWord(gfn, m.word(gfn)! - 1);
      r.table.unmap(gfn);
    },
    (m) => ((m.word(gfn) ?? 0) & 0xffff) > 0,
  );
/** A guest may write anything into its units. */
const forge = (gfn: number, word: number) =>
  command(
    `forge(${gfn}, 0x${word.toString(16)})`,
    (m, r) => {
      m.setWord(gfn, word);
      r.table.set(gfn, word);
    },
    (m) => m.word(gfn) !== undefined,
  );

const on = (complete: boolean, valid: boolean) =>
  command(`on(${complete ? "complete" : "partial"}${valid ? "" : ", bad root"})`, (m, r) => {
    m.pinPage = true;
    if (valid) m.activate(complete);
    else m.deactivate();
    const status = r.on({ flags: complete ? 1 : 0, ...(valid ? {} : { root: 8 }) });
    assert.equal(status, valid ? 1 : 0x84, "pin_status");
  });
const off = command(
  "off",
  (m, r) => {
    m.deactivate();
    r.set("pinControl", 0);
  },
  (m) => m.pinPage,
);
const park = (by: 1 | -1) =>
  command(
    by > 0 ? "park" : "unpark",
    (m, r) => {
      if (m.on) m.parks = Math.max(0, m.parks + by);
      r.set("pinControl", by > 0 ? 2 : 3);
      assert.equal(r.get("pinStatus"), !m.on ? 0x82 : m.parks > 0 ? 2 : 1, "pin_status");
    },
    (m) => m.pinPage,
  );
const deviceReset = command("device reset", (m, r) => {
  m.deactivate();
  m.pinPage = false;
  r.device.reset();
});
const machineReset = command("machine reset", (m, r) => {
  m.machineReset();
  r.device.reset();
  r.device.machineReset();
});

// --- the host --------------------------------------------------------------------------------------------------------

const pass = command("pass", (m, r) => {
  m.pass();
  r.pass();
});
/** `one`, `two`: the memory behind the blocks that come and go; 0: none. */
const memoryMap = (one: number, two: number) =>
  command(`memory(${one}, ${two})`, (m, r) => {
    const backing = [0, one || undefined, two || undefined, 0, 0];
    m.setBacking(backing);
    setMemory(r, backing);
  });
const hostPins = (more: number, errno: string) =>
  command(`host pins ${more} more, then ${errno}`, (m, r) => {
    m.pagesMax = r.pinner.pagesMax = m.pages + more;
    r.pinner.splitsFree = true;
    m.errno = r.pinner.errno = errno;
  });
const hostReleases = (on: boolean) =>
  command(`host ${on ? "releases" : "does not release"}`, (m, r) => {
    m.releases = on;
    r.pinner.releasesMax = on ? Number.POSITIVE_INFINITY : 0;
  });
const toggleWindow = command("window", (m, r) => {
  if (m.window) r.gate.leave();
  else r.gate.enter();
  m.window = !m.window;
});
const touch = (gfn: number) =>
  command(`touch(${gfn})`, (m, r) => {
    const allowed = r.gate.allows(gfn as Gfn) || r.gate.request(gfn as Gfn);
    assert.equal(allowed, m.touch(gfn), "touch");
  });

/** Regions keep their memory as long as it is behind them. */
function setMemory(r: Rig, backing: (number | undefined)[]): void {
  const regions = BLOCKS.flatMap((b, i) => {
    const memory = backing[i];
    if (memory === undefined) return [];
    const kept = memory === r.backing[i] && r.memory.regions.find((region) => region.gpa === b.first * 4096);
    return [kept || ramRegion(b.first * 4096, b.frames, 0x7f00_0000_0000 + memory * 2 ** 32)];
  });
  r.backing = backing;
  try {
    r.tracker.setMemory(regions);
  } catch (error) {
    assert.ok(error instanceof HostError);
  }
}

// --- the property ------------------------------------------------------------------------------------------------------

const frame = fc.constantFrom(...FRAMES);
const range = fc.record(
  { gfn: frame, nrFrames: fc.oneof(fc.constant(1), fc.integer({ min: 1, max: 17 })) },
  { noNullPrototype: true },
);
const word = fc
  .tuple(fc.subarray([16, 27, 28, 29, 30, 31]), fc.nat(2))
  .map(([bits, count]) => bits.reduce((sum, bit) => (sum | (1 << bit)) >>> 0, count));
const memory = fc.constantFrom(0, 1, 1, 1, 2);
const limit = fc.constantFrom(0, 1, 3, Number.POSITIVE_INFINITY);

const played = commands<HostModel, Rig>(
  [
    ...[frame, frame].map((f) => f.map(map)),
    frame.map(unmap),
    fc.array(range, { minLength: 1, maxLength: 4 }).map(pin),
    fc.tuple(fc.constantFrom(...(Object.keys(FLAWS) as Flaw[])), frame).map((a) => malformed(...a)),
    fc.constant(emptyRange),
    fc.tuple(frame, word).map((a) => forge(...a)),
    fc.tuple(fc.boolean(), fc.integer({ min: 0, max: 4 })).map(([complete, n]) => on(complete, n > 0)),
    fc.constantFrom(off, deviceReset, machineReset, park(1), park(-1), park(-1)),
    ...[0, 1].map(() => fc.constant(pass)),
    fc.tuple(memory, memory).map((a) => memoryMap(...a)),
    fc.tuple(limit, fc.constantFrom("ENOMEM", "EPERM")).map((a) => hostPins(...a)),
    fc.boolean().map(hostReleases),
    fc.constant(toggleWindow),
    frame.map(touch),
  ],
  100,
);
/** Tight ones, and one that is never in the way; with `bios`, above what firmware's window has. */
const quota = fc.constantFrom(2, 5, 20, Number.POSITIVE_INFINITY);

function create(quota: number, bios: boolean, options: MachineOptions): { model: HostModel; real: Rig } {
  const model = new HostModel(bios ? quota + 80 : quota, bios, BLOCKS);
  const backing = [0, 1, 1, 0, 0];
  const regions = BLOCKS.map((b, i) =>
    ramRegion(b.first * 4096, b.frames, 0x7f00_0000_0000 + backing[i]! * 2 ** 32),
  );
  const real = {
    ...viommu({ regions, quota: model.quota, beforeActivation: bios ? "bios" : "none", ...options }),
    backing,
  };
  // A look at the clock is half a millisecond: waiting for a window that stays open ends soon.
  real.clock.step = 5e5;
  model.setBacking(backing);
  return { model, real };
}

const doesWhatTheAbiSays = (options: MachineOptions = {}) =>
  fc.property(quota, fc.boolean(), played, (quota, bios, played) =>
    fc.modelRun(() => create(quota, bios, options), played),
  );

holds("PIN does what the ABI says, whatever guest and host do", doesWhatTheAbiSays(), 300);

class KeepsP extends DmaTrackingTable {
  override claimForUnpin(unit: Unit): ReturnType<DmaTrackingTable["claimForUnpin"]> {
    const outcome = super.claimForUnpin(unit);
    if (outcome === "claimed") this.setPinned(unit);
    return outcome;
  }
}
fails(
  "an unpin that leaves P set",
  doesWhatTheAbiSays({ openTable: (...a) => new KeepsP(...a) }),
  /unit of frame/,
);
fails(
  "a tracker that knows no quota",
  doesWhatTheAbiSays({ quota: Number.POSITIVE_INFINITY }),
  /status|touch|may reach/,
);
