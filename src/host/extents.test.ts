/** Extents over real pins: what the kernel counts, and what its limit does to a split. */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import test from "node:test";
import { IoUringPinner } from "./io-uring-pinner.ts";

// In CI a missing real part fails.
const skip = process.env.CI ? false : (IoUringPinner.unavailable() ?? false);
const load = (path: string) => `await import(${JSON.stringify(import.meta.resolve(path))})`;

/**
 * 200 frames are pinned in a process of its own, and `scenario` says what goes; prints what it makes of it as JSON.
 * `second`: how that process maps memory a second time.
 */
const child = (scenario: string, second: string) => `
  const { IoUringPinner } = ${load("./io-uring-pinner.ts")};
  const { createMemfd, FdMapper } = ${load("./mapping.ts")};
  const { PresentMappings } = ${load("./present-mappings.ts")};
  const { GuestMemory } = ${load("../memory/guest-memory.ts")};
  const { GfnBuffer } = ${load("../policy/policy.ts")};
  const { Pins } = ${load("../tracking/pins.ts")};
  const fs = await import("node:fs");
  const { spawnSync } = await import("node:child_process");
  const size = 4096 * 4096;
  const fd = createMemfd("extents", size);
  const file = fs.openSync("/proc/self/fd/" + fd, "r+");
  const refusals = [];
  const present = ${second};
  const memory = new GuestMemory([{ gpa: 0, size, ...new FdMapper(present).map(fd, 0, size) }]);
  const pinner = new IoUringPinner();
  const iommu = { allow() {}, revoke() {}, quiesce: () => true };
  const pins = new Pins({ memory, pinner, iommu, policy: { pinned() {}, tried() {} }, clock: { now: () => 0 } });
  const frames = (first, count) => Array.from({ length: count }, (_, i) => first + i);
  const unpin = (gfns, discarded = false) => {
    const list = new GfnBuffer(4096);
    for (const gfn of gfns) list.push(gfn);
    if (discarded) pins.addOthers(list);
    return [pins.unpin(list, 0), pins.size, pinner.kernelPinnedPages()];
  };
  const blocks = () => fs.fstatSync(file).blocks / 8;
  const punch = (gfn, count) =>
    spawnSync("fallocate", [
      ...["--punch-hole", "--offset", String(4096 * gfn), "--length", String(4096 * count)],
      "/proc/" + process.pid + "/fd/" + file,
    ]).status;
  const out = [];
  pins.pin(frames(0, 200), 1);
  out.push(pinner.kernelPinnedPages());
  ${scenario}
  console.log(JSON.stringify(out));
  pinner.close();`;

/** Root without a capability: another user may not read where this runs from. */
const unprivileged = process.getuid?.() === 0 ? ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] : [];

const PRESENT = "new PresentMappings((reason) => refusals.push(reason))";

function run(scenario: string, before: readonly string[] = [], second = PRESENT): unknown {
  const command = [...before, process.execPath, "--input-type=module", "-e", child(scenario, second)];
  const done = spawnSync(command[0]!, command.slice(1), { encoding: "utf8", cwd: "/" });
  assert.equal(done.status, 0, done.stderr);
  return JSON.parse(done.stdout);
}

test("the kernel counts what the ledger has, whatever part of an extent goes", { skip }, () => {
  const scenario = `
    out.push(unpin([3]), unpin([4, 5, 31, 32]), unpin(frames(64, 32)), unpin(frames(0, 200).filter((gfn) => pins.ledger.has(gfn))));`;
  assert.deepEqual(run(scenario), [200, [1, 199, 199], [4, 195, 195], [32, 163, 163], [163, 0, 0]]);
});

test("what another process has discarded goes along, and its memory stays away", { skip }, () => {
  const scenario = `
    out.push(blocks(), punch(5, 2), blocks());
    out.push(unpin([3]), blocks(), unpin([3], true), blocks());`;
  assert.deepEqual(run(scenario), [200, 200, 0, 198, [0, 200, 200], 198, [3, 197, 197], 198]);
});

/** Frame 5 is discarded when the split has looked, and is about to pin. */
const RACE = `
  const { pin } = pinner;
  pinner.pin = (...args) => {
    punch(5, 1);
    pin.apply(pinner, args);
  };
  out.push(unpin([3], true), blocks(), pins.ledger.has(5));
  pinner.pin = pin;
  out.push(unpin([pins.ledger.has(3) ? 3 : 0], true), blocks(), pins.ledger.has(5));`;

test("what is discarded while its extent is about to be split gets no memory, and goes later", {
  skip,
}, () => {
  for (const user of [[], unprivileged])
    assert.deepEqual(run(RACE, user), [200, [0, 200, 200], 199, true, [2, 198, 198], 199, false]);
});

test("broken twin: a split that pins where every page gets memory gives it back what was discarded", {
  skip,
}, () => {
  const found = run(RACE, [], "{ of: (address) => address }");
  assert.deepEqual(found, [200, [1, 199, 199], 200, true, [1, 198, 198], 200, true]);
});

test("a page that nobody has touched through the second mapping is found there", { skip }, () => {
  // Of another process's, as a guest's memory is.
  const scenario = `
    const region = memory.regions[0];
    out.push(new Set([region.hostAddress, region.presentAddress]).size, blocks());
    const handles = new Int32Array(1);
    const pinAt = (gfn) => {
      try { pinner.pin(Float64Array.of(region.presentAddress + 4096 * gfn), 1, handles); return "pinned"; }
      catch (error) { return error.errno; }
    };
    out.push(pinAt(300), blocks());
    const written = spawnSync("dd", ["if=/dev/zero", "bs=4096", "count=1", "seek=300", "conv=notrunc",
      "of=/proc/" + process.pid + "/fd/" + file]).status;
    out.push(written, pinAt(300), blocks(), refusals);`;
  assert.deepEqual(run(scenario), [200, 2, 200, "EFAULT", 200, 0, "pinned", 201, []]);
});

test("memory that cannot be mapped a second time is told of, once, and is pinned page by page", {
  skip,
}, () => {
  const scenario = `
    const other = new PresentMappings((reason) => refusals.push(reason));
    out.push(other.of(4096, 4096) ?? null, other.of(4096, 4096) ?? null, refusals);
    other.close();`;
  assert.deepEqual(run(scenario), [200, null, null, ["mremap: EFAULT (4096 bytes)"]]);
});

test("at the memlock limit: an extent that has no room for its rest stays, and goes when others have gone", {
  skip,
}, () => {
  // Single pages until there is room for none; the rest of an extent of 32 needs 31 in vain, then 6 of 40.
  const scenario = `
    let singles = 0;
    try { for (;; singles++) pins.pin([1000 + 2 * singles], 1); } catch (error) { out.push(error.errno); }
    const full = pins.size;
    out.push([full - singles, pinner.kernelPinnedPages() === full, singles > 40]);
    out.push(unpin([3]).map((n, i) => (i ? n - full : n)));
    out.push(unpin([3, ...Array.from({ length: 30 }, (_, i) => 1000 + 2 * i)]).map((n, i) => (i ? n - full : n)));
    out.push(unpin(frames(3, 26)).map((n, i) => (i ? n - full : n)));`;
  const limited = [...unprivileged, "prlimit", "--memlock=2097152:2097152"];
  const refused = [0, 0, 0];
  const madeRoom = [30, -30, -30];
  assert.deepEqual(run(scenario, limited), [
    ...[200, "ENOMEM", [200, true, true], refused],
    ...[madeRoom, [26, -56, -56]],
  ]);
});
