import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import test from "node:test";
import { InvariantViolation } from "../base/errors.ts";
import { IoUringPinner } from "./io-uring-pinner.ts";
import { canExceedMemlock } from "./limits.ts";
import { createMemfd, FdMapper } from "./mapping.ts";
import { SoftwarePinner } from "./software-pinner.ts";

// In CI a missing real part fails.
const unavailable = process.env.CI ? undefined : IoUringPinner.unavailable();
const skip = process.env.CI ? false : (unavailable ?? (canExceedMemlock() ? false : "needs CAP_IPC_LOCK"));

/** `pages` pages of a shared memfd, their addresses, and a pinner; everything is closed after the test. */
function setUp(t: test.TestContext, pages: number, options = {}) {
  const mapper = new FdMapper();
  const { hostAddress } = mapper.map(createMemfd("pins", pages * 4096), 0, pages * 4096);
  const pinner = new IoUringPinner(options);
  t.after(() => {
    pinner.close();
    assert.equal(pinner.kernelPinnedPages(), 0);
    mapper.close();
  });
  const addresses = Float64Array.from({ length: pages }, (_, i) => hostAddress + i * 4096);
  return { pinner, addresses, handles: new Int32Array(pages), hostAddress };
}

test("VmPin rises and falls by exactly the pages pinned", { skip }, (t) => {
  const { pinner, addresses, handles } = setUp(t, 3000);
  pinner.pin(addresses, 1, handles);
  assert.equal(pinner.kernelPinnedPages(), 1);
  assert.equal(pinner.release(handles, 1), 1);
  assert.equal(pinner.kernelPinnedPages(), 0);

  pinner.pin(addresses, 3000, handles);
  assert.equal(pinner.kernelPinnedPages(), 3000);
  assert.equal(new Set(handles).size, 3000);
  assert.equal(pinner.release(handles, 2500), 2500);
  assert.equal(pinner.kernelPinnedPages(), 500);
  assert.equal(pinner.release(handles.subarray(2500), 500), 500);
  assert.equal(pinner.kernelPinnedPages(), 0);
});

test("more pages than one ring holds, released in another order than pinned", { skip }, (t) => {
  const pages = 40_000;
  const { pinner, addresses, handles } = setUp(t, pages);
  pinner.pin(addresses, pages, handles);
  assert.equal(pinner.kernelPinnedPages(), pages);
  const odd = handles.filter((_, i) => i % 2 === 1);
  assert.equal(pinner.release(odd, odd.length), pages / 2);
  assert.equal(pinner.kernelPinnedPages(), pages / 2);
  pinner.pin(addresses, pages / 2, odd);
  assert.equal(pinner.kernelPinnedPages(), pages);
  const rest = handles.filter((_, i) => i % 2 === 0).reverse();
  assert.equal(pinner.release(rest, rest.length), pages / 2);
  assert.equal(pinner.release(odd, odd.length), pages / 2);
  assert.equal(pinner.kernelPinnedPages(), 0);
});

test("an extent is one handle and counts all its pages", { skip }, (t) => {
  const { pinner, hostAddress } = setUp(t, 8192);
  const handle = pinner.pinExtent(hostAddress + 4096, 8191 * 4096);
  assert.equal(pinner.kernelPinnedPages(), 8191);
  assert.equal(pinner.release(Int32Array.of(handle), 1), 1);
  assert.equal(pinner.kernelPinnedPages(), 0);
  assert.throws(() => pinner.pinExtent(hostAddress, 2 ** 30 + 4096), InvariantViolation);
  assert.throws(() => pinner.pinExtent(4096, 2 * 4096), { errno: "EFAULT" });
  assert.equal(pinner.kernelPinnedPages(), 0);
});

test("one page that cannot be pinned: nothing is", { skip }, (t) => {
  const { pinner, addresses, handles } = setUp(t, 5000);
  addresses[4321] = 4096;
  assert.throws(() => pinner.pin(addresses, 5000, handles), {
    code: "ERR_COIOMMU_HOST",
    syscall: "io_uring_register",
    errno: "EFAULT",
  });
  assert.equal(pinner.kernelPinnedPages(), 0);
  pinner.pin(addresses, 4321, handles);
  assert.equal(pinner.kernelPinnedPages(), 4321);
});

test("a full set of rings refuses with ENOSPC and keeps what it has", { skip }, (t) => {
  const { pinner, addresses, handles } = setUp(t, 16385, { ringsMax: 1 });
  assert.throws(() => pinner.pin(addresses, 16385, handles), { errno: "ENOSPC" });
  pinner.pin(addresses, 16384, handles);
  assert.throws(() => pinner.pin(addresses, 1, new Int32Array(1)), { errno: "ENOSPC" });
  assert.equal(pinner.kernelPinnedPages(), 16384);
});

test("a second release is our bug", { skip }, (t) => {
  const { pinner, addresses, handles } = setUp(t, 4);
  pinner.pin(addresses, 4, handles);
  pinner.release(handles, 2);
  assert.throws(() => pinner.release(handles, 2), InvariantViolation);
  assert.throws(() => pinner.release(Int32Array.of(handles[3]! + 1), 1), InvariantViolation);
  assert.equal(pinner.kernelPinnedPages(), 2);
});

test("close releases everything at once, and the pinner can be used again", { skip }, (t) => {
  const { pinner, addresses, handles } = setUp(t, 20_000);
  pinner.pin(addresses, 20_000, handles);
  pinner.close();
  pinner.close();
  assert.equal(pinner.kernelPinnedPages(), 0);
  assert.throws(() => pinner.release(handles, 1), InvariantViolation);
  pinner.pin(addresses, 1, handles);
  assert.equal(pinner.kernelPinnedPages(), 1);
});

/** Run as an unprivileged user with 1 MiB of memlock; prints what happened as JSON. */
const child = `
  const { IoUringPinner } = await import(${JSON.stringify(import.meta.resolve("./io-uring-pinner.ts"))});
  const { createMemfd, FdMapper } = await import(${JSON.stringify(import.meta.resolve("./mapping.ts"))});
  const { canExceedMemlock, memlockLimit } = await import(${JSON.stringify(import.meta.resolve("./limits.ts"))});
  const { hostAddress } = new FdMapper().map(createMemfd("pins", 4096 * 4096), 0, 4096 * 4096);
  const addresses = Float64Array.from({ length: 4096 }, (_, i) => hostAddress + i * 4096);
  const pinner = new IoUringPinner();
  const handles = new Int32Array(4096);
  const out = { limit: memlockLimit(), exceeds: canExceedMemlock() };
  pinner.pin(addresses, 100, handles);
  try { pinner.pin(addresses, 4096, handles.slice()); } catch (e) { out.refused = [e.code, e.errno]; }
  out.after = pinner.kernelPinnedPages();
  try { pinner.pinExtent(hostAddress, 4096 * 4096); } catch (e) { out.extent = e.errno; }
  out.released = pinner.release(handles, 100);
  pinner.pin(addresses, 100, handles);
  out.end = pinner.kernelPinnedPages();
  console.log(JSON.stringify(out));`;

test("an unprivileged process at its memlock limit: ENOMEM, all or nothing", {
  skip: unavailable ?? false,
}, () => {
  const command = [process.execPath, "--input-type=module", "-e", child];
  command.unshift("prlimit", "--memlock=1048576:1048576");
  if (process.getuid?.() === 0)
    command.unshift("setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock");
  const run = spawnSync(command[0]!, command.slice(1), { encoding: "utf8", cwd: "/" });
  assert.equal(run.status, 0, run.stderr);
  assert.deepEqual(JSON.parse(run.stdout), {
    limit: 1048576,
    exceeds: false,
    refused: ["ERR_COIOMMU_HOST", "ENOMEM"],
    after: 100,
    extent: "ENOMEM",
    released: 100,
    end: 100,
  });
});

test("the software pinner hands out handles and catches double releases too", () => {
  const pinner = new SoftwarePinner();
  const handles = new Int32Array(20_000);
  pinner.pin(new Float64Array(20_000), 20_000, handles);
  const extent = pinner.pinExtent();
  assert.equal(new Set([...handles, extent]).size, 20_001);
  assert.equal(pinner.release(handles, 20_000), 20_000);
  assert.throws(() => pinner.release(handles, 1), InvariantViolation);
  assert.equal(pinner.kernelPinnedPages(), null);
});
