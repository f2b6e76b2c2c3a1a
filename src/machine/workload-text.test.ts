import assert from "node:assert/strict";
import { test } from "node:test";
import { UserError } from "../base/errors.ts";
import { parseFioWorkload, parseGpuWorkload, parseNicWorkload } from "./workload-text.ts";

test("a workload's options have defaults and units", () => {
  const defaults = { rw: "randread", blockSize: 4096, ioDepth: 32, seconds: 5 };
  assert.deepEqual(parseFioWorkload("fio"), defaults);
  assert.deepEqual(parseFioWorkload("fio:rw=readwrite,bs=1M,iodepth=1,seconds=3600,size=2g"), {
    ...{ rw: "rw", blockSize: 2 ** 20, ioDepth: 1, seconds: 3600, size: 2 ** 31 },
  });
  const nic = { mode: "recycled", traffic: "receive", size: 1500, seconds: 5 };
  assert.deepEqual(parseNicWorkload("nic"), nic);
  assert.deepEqual(parseNicWorkload("nic:mode=half,traffic=loopback,size=9000,seconds=2"), {
    ...{ mode: "half", traffic: "loopback", size: 9000, seconds: 2 },
  });
  const gpu = { buffers: 4, size: 2 ** 24, holdMs: 1000, ioDepth: 8, seconds: 5 };
  assert.deepEqual(parseGpuWorkload("gpu"), gpu);
  assert.deepEqual(parseGpuWorkload("gpu:size=64M,buffers=1,hold=50"), {
    ...gpu,
    ...{ buffers: 1, size: 2 ** 26, holdMs: 50 },
  });
});

const parsers = { fio: parseFioWorkload, nic: parseNicWorkload, gpu: parseGpuWorkload };
for (const [parser, text, named] of [
  ["fio", "iperf:seconds=1", /"iperf"/],
  ["fio", "fio:depth=4", /"depth"/],
  ["fio", "fio:rw=trim", /rw/],
  ["fio", "fio:bs=511", /bs/],
  ["fio", "fio:bs=1000", /bs/],
  ["fio", "fio:bs=2M", /bs/],
  ["fio", "fio:bs=4KB", /bs/],
  ["fio", "fio:iodepth=0", /iodepth/],
  ["fio", "fio:iodepth=257", /iodepth/],
  ["fio", "fio:seconds=0.5", /seconds/],
  ["fio", "fio:seconds=", /seconds/],
  ["fio", "fio:seconds=1,seconds=2", /seconds/],
  ["fio", "fio:size=4k", /size/],
  ["nic", "fio", /"fio"/],
  ["nic", "nic:mode=constructor", /mode/],
  ["nic", "nic:traffic=send", /traffic/],
  ["nic", "nic:size=59", /size/],
  ["nic", "nic:size=9001", /size/],
  ["gpu", "gpu:rw=read", /"rw"/],
  ["gpu", "gpu:size=65M", /size/],
  ["gpu", "gpu:size=65537", /size/],
  ["gpu", "gpu:buffers=0", /buffers/],
  ["gpu", "gpu:hold=0", /hold/],
] as const)
  test(`refused: --workload ${text}`, () => {
    const check = (error: unknown) =>
      error instanceof UserError &&
      error.exitCode === 2 &&
      named.test(error.message) &&
      /--workload/.test(error.message);
    assert.throws(() => parsers[parser](text), check);
  });
