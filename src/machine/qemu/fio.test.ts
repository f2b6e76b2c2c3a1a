import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { parseFioWorkload } from "../workload-text.ts";
import { fioArguments, parseFioOutput } from "./fio.ts";

/** Written by fio 3.33 in a guest; statistics that nobody reads are left out. */
const captured = (name: string) => readFileSync(join(import.meta.dirname, "fixtures", name), "utf8");

test("what reads is one job; what writes is filled before and checked after", () => {
  const names = (rw: string) =>
    fioArguments(parseFioWorkload(`fio:rw=${rw}`), "/dev/vda").filter((word) => word.startsWith("--name="));
  assert.deepEqual(names("randread"), ["--name=measured"]);
  assert.deepEqual(names("randrw"), ["--name=fill", "--name=measured", "--name=check"]);
});

test("the checked region is a multiple of its requests, and they of the blocks", () => {
  const words = fioArguments(parseFioWorkload("fio:rw=write,bs=1536,size=10M"), "/dev/vda");
  const number = (name: string) => Number(words.find((word) => word.startsWith(`--${name}=`))!.split("=")[1]);
  assert.equal(number("bs") % 1536, 0);
  assert.equal(number("size") % number("bs"), 0);
});

test("the result of reads is the measured phase, unverified", () => {
  assert.deepEqual(parseFioOutput(captured("fio-randread.json")), {
    ...{ ops: 5184, iops: 5168.494516, bytesPerSecond: 21170153, verified: null, errors: 0 },
    latencyUs: { p50: 5406.72, p99: 16711.68 },
  });
});

test("the result of writes counts neither filling nor checking", () => {
  const { ops, iops, verified, errors } = parseFioOutput(captured("fio-randwrite.json"));
  assert.deepEqual(
    { ops, iops, verified, errors },
    { ops: 6244, iops: 6237.762238, verified: true, errors: 0 },
  );
});

test("a check that failed, or that read nothing, has not verified", () => {
  const edited = (edit: (check: { error: number; read: { total_ios: number } }) => void) => {
    const output = JSON.parse(captured("fio-randwrite.json"));
    edit(output.jobs[2]);
    return parseFioOutput(`verify: bad header\n${JSON.stringify(output)}`);
  };
  const failed = edited((check) => {
    check.error = 84;
  });
  assert.deepEqual([failed.verified, failed.errors], [false, 1]);
  const idle = edited((check) => {
    check.read.total_ios = 0;
  });
  assert.equal(idle.verified, false);
});

test("without a result, fio's complaint is the error", () => {
  assert.throws(() => parseFioOutput("fio: file /dev/vda: No such device\n"), /No such device/);
});
