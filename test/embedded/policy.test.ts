import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import test, { type TestContext } from "node:test";
import { parseEvent } from "../../src/wire/event-log.ts";
import { Cli, complaint } from "../support/cli.ts";

const EXAMPLE = new URL("../../examples/policies/keep.ts", import.meta.url).pathname;
const RUN = ["run", "--machine", "embedded", "--memory", "256M", "--interval", "100ms", "--json", "-"];
const WORKLOAD = ["--workload", "fio:rw=randread,bs=4k,iodepth=8,seconds=2,size=16M"];

function folderOf(t: TestContext): string {
  const folder = mkdtempSync(path.join(tmpdir(), "coiommu-record-"));
  t.after(() => rmSync(folder, { recursive: true }));
  return folder;
}

async function succeeds(args: readonly string[]) {
  const cli = new Cli(args);
  const { code, stdout, stderr } = await cli.ended;
  assert.equal(code, 0, stderr);
  return JSON.parse(stdout);
}

test("a run is recorded, and replayed: the same mappings, and the same pins", async (t) => {
  const log = path.join(folderOf(t), "run.log");
  const run = await succeeds([...RUN, ...WORKLOAD, "--record", log]);
  const replayed = await succeeds([
    "replay",
    log,
    "--interval",
    "100ms",
    "--policy",
    "lru",
    "--policy",
    "off",
    "--json",
    "-",
  ]);
  assert.deepEqual(
    [replayed.schema, replayed.trace.malformed, replayed.trace.unmatchedUnmaps, replayed.trace.devices],
    ["coiommu.replay/1", 0, 0, ["0000:00:04.0"]],
  );
  const [lru, off] = replayed.results;
  assert.deepEqual([lru.maps, lru.unmaps], [run.maps.map, run.maps.unmap]);
  assert.deepEqual([lru.policy, off.policy, off.pins.framesUnpinned], ["lru", "off", 0]);
  // Passes fall where they did not fall in the run, by less than an interval.
  const near = (a: number, b: number) => Math.abs(a - b) <= 0.25 * Math.max(a, b) + 16;
  assert.ok(near(lru.pins.framesMean, run.pins.framesMean), `${lru.pins.framesMean}, ${run.pins.framesMean}`);
  assert.ok(lru.ofOptimal >= 1 && lru.ofOptimal < 3, `${lru.ofOptimal}`);
  assert.ok(off.pins.framesPinned <= lru.pins.framesPinned);
  // What the host pinned is in the log, as its counters have it.
  const frames = { pinned: 0, unpinned: 0, map: 0, unmap: 0 };
  for (const line of readFileSync(log, "latin1").trimEnd().split("\n").slice(1)) {
    const { kind, ranges } = parseEvent(line)!;
    frames[kind] += ranges.reduce((sum, [, n]) => sum + n, 0);
  }
  assert.equal(frames.pinned, run.pins.framesPinned);
  assert.deepEqual([frames.map, frames.unmap], [run.maps.framesMapped, run.maps.framesUnmapped]);
});

test("the policy of the guide: offline and live", async (t) => {
  const log = path.join(folderOf(t), "run.log");
  // Far below the time that a machine of any speed takes to come back to all of its frames.
  const soon = ["--policy", `${EXAMPLE},for=10ms`, "--interval", "10ms"];
  const live = await succeeds([...RUN, ...WORKLOAD, "--record", log, ...soon]);
  assert.deepEqual([live.policy, live.policyParameters], ["keep", { for: 10 }]);
  assert.ok(live.pins.framesUnpinned > 0 && live.dma.faults === 0);
  const late = ["--policy", `${EXAMPLE},for=3600s`];
  const { results } = await succeeds(["replay", log, ...soon, ...late, "--json", "-"]);
  assert.deepEqual([results[0].policy, results[1].policy], ["keep", "keep"]);
  assert.ok(results[0].pins.framesUnpinned > 0);
  assert.equal(results[1].pins.framesUnpinned, 0);
});

for (const [what, args, code, message] of [
  ["a log that is none", ["replay", EXAMPLE], 2, /its first line is not that of a log/],
  ["a log that is not there", ["replay", "nowhere.log"], 2, /nowhere\.log: ENOENT/],
  ["a policy that is none", ["replay", "nowhere.log", "--policy", "mru"], 2, /no policy is named "mru"/],
  [
    "a recording under another strategy",
    ["run", "--strategy", "static", "--record", "x.log"],
    2,
    /strategy static has no driver/,
  ],
  [
    "a recording that cannot be written",
    ["run", "--record", "/nowhere/x.log"],
    2,
    /--record \/nowhere\/x\.log: ENOENT/,
  ],
  [
    "bounds of an interval that is fixed",
    ["run", "--interval", "1s", "--interval-min", "1s"],
    2,
    /are bounds of --interval adaptive/,
  ],
  [
    "bounds that are none",
    ["run", "--interval", "adaptive", "--interval-min", "20s"],
    2,
    /above --interval-max 10000ms/,
  ],
] as const)
  test(`${what} is told in one sentence`, async () => {
    const ended = await new Cli(args).ended;
    assert.equal(ended.code, code);
    assert.match(complaint(ended), message);
  });

test("a full disk ends the recording, not the run", async () => {
  const cli = new Cli([...RUN, "--workload", "idle:seconds=1", "--record", "/dev/full"]);
  assert.equal((await cli.ended).code, 0, cli.stderr);
  assert.match(cli.stderr, /warning: the recording ends here: write: ENOSPC/);
});

test("an empty log says that nothing is mapped in it", async (t) => {
  const log = path.join(folderOf(t), "empty.log");
  writeFileSync(
    log,
    `${JSON.stringify({ format: "coiommu-log/1", memoryMiB: 64, machine: "x", workload: "y" })}\n`,
  );
  const cli = new Cli(["replay", log]);
  assert.equal((await cli.ended).code, 1);
  assert.match(cli.stderr, /nothing is mapped in it/);
});
