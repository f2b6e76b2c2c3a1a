import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import fs from "node:fs";
import test from "node:test";
import { withoutMemory } from "./discarded.ts";
import { IoUringPinner } from "./io-uring-pinner.ts";
import { nativeUnavailable } from "./libc.ts";
import { createMemfd, FdMapper } from "./mapping.ts";

const PAGE = 4096;
const PAGES = 64;
const unavailable = nativeUnavailable() ?? IoUringPinner.unavailable();
// In CI a missing real part fails.
const skip = process.env.CI || unavailable === undefined ? false : unavailable;

test("holes that another process punches under pins are seen, until the memory comes back", { skip }, (t) => {
  const fd = createMemfd("holes", PAGES * PAGE);
  const other = fs.openSync(`/proc/self/fd/${fd}`, "r+");
  const mapper = new FdMapper();
  const { hostAddress, bytes } = mapper.map(fd, 0, PAGES * PAGE);
  const pinner = new IoUringPinner();
  t.after(() => {
    pinner.close();
    mapper.close();
    fs.closeSync(other);
  });
  const addresses = Float64Array.from({ length: PAGES }, (_, i) => hostAddress + i * PAGE);
  pinner.pin(addresses, PAGES, new Int32Array(PAGES));
  const punch = (page: number, count: number) => {
    const range = ["--offset", String(page * PAGE), "--length", String(count * PAGE)];
    const file = `/proc/${process.pid}/fd/${other}`;
    const { status, stderr, error } = spawnSync("fallocate", ["--punch-hole", ...range, file]);
    assert.equal(status, 0, error?.message ?? String(stderr));
  };
  /** Asked in this order; the pages found to be gone. */
  const gone = (asked: readonly number[]) => {
    const out = new Uint8Array(PAGES).fill(7);
    withoutMemory(
      Float64Array.from(asked, (i) => addresses[i]!),
      asked.length,
      out,
    );
    assert.ok(out.subarray(asked.length).every((byte) => byte === 7));
    return asked.filter((_, i) => out[i] === 1);
  };
  const all = Array.from({ length: PAGES }, (_, i) => i);
  assert.deepEqual(gone(all), []);
  punch(3, 2);
  punch(PAGES - 1, 1);
  assert.deepEqual(gone(all), [3, 4, PAGES - 1]);
  assert.deepEqual(gone([4, 5, 9, 3, 63]), [4, 3, 63], "in any order");
  assert.equal(pinner.kernelPinnedPages(), PAGES, "the pins are still there");
  bytes[4 * PAGE] = 1;
  assert.deepEqual(gone(all), [3, PAGES - 1], "memory that has come back is not noticed");
  assert.deepEqual(gone([]), []);
});
