import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type TestContext, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { gzipSync } from "node:zlib";
import { AgentInGuest } from "../../test/support/agent-in-guest.ts";
import type { Bdf } from "../base/units.ts";
import { monotonicClock } from "../host/clock.ts";
import { GuestAgent } from "../machine/qemu/agent.ts";
import { parseEvent } from "../wire/event-log.ts";
import { GuestRecording } from "./guest-recording.ts";
import { Recording } from "./recording.ts";

const MEMORY_MIB = 1;
/** So far the guest's clock is behind ours, in seconds. */
const BEHIND = 3;
const guestNow = () => monotonicClock.now() / 1e9 - BEHIND;

const traceLine = (time: number, event: string) => `  <...>-190     [000]      ${time.toFixed(6)}: ${event}`;
const mapped = (time: number, left = 0) =>
  traceLine(time, `coiommu_map: 0000:00:04.0 addr=5000 size=4096 left=${left}`);

interface Said {
  /** The trace, when something is mapped at `time`. */
  readonly lines?: (time: number) => readonly string[];
  /** Instead of its gzip. */
  readonly packed?: Buffer;
  readonly size?: string;
  readonly stats?: string;
  readonly marks?: string;
}

/** Record a guest that says `said` when it is asked; gives what was written, the warnings, and when it mapped. */
async function record(t: TestContext, said: Said) {
  const folder = mkdtempSync(join(tmpdir(), "coiommu-test-"));
  t.after(() => rmSync(folder, { recursive: true }));
  const warnings: string[] = [];
  const onWarning = (text: string) => warnings.push(text);
  let lines: readonly string[] = [];
  let marks = "";
  const packed = () => said.packed ?? gzipSync(lines.map((line) => `${line}\n`).join(""));
  const guest: AgentInGuest = new AgentInGuest((script) => {
    if (script === "!") marks += `${traceLine(guestNow(), `tracing_mark_write: ${guest.marks.at(-1)}`)}\n`;
    if (script.startsWith("cat")) return said.marks ?? marks;
    if (script.includes("stats"))
      return said.stats ?? `entries: ${lines.filter((line) => !line.startsWith("#")).length}\n`;
    if (script.startsWith("gzip")) return said.size ?? `${packed().length}\n`;
    if (script.startsWith("dd")) return packed().toString("base64");
    return "";
  });
  const agent = new GuestAgent(guest, () => "");
  const file = join(folder, "log");
  const began = monotonicClock.now();
  const recording = new Recording(file, began, onWarning);
  recording.head({ memoryMiB: MEMORY_MIB, machine: "qemu", workload: "a test" });
  const settings = { memoryMiB: MEMORY_MIB, cpus: 1, frames: 256, onWarning };
  const ofGuest = await GuestRecording.begin(agent, recording, settings);
  await sleep(5);
  const time = monotonicClock.now() - began;
  lines = said.lines?.(guestNow()) ?? [];
  await sleep(5);
  await ofGuest.end();
  recording.close();
  const [, ...written] = readFileSync(file, "utf8").trimEnd().split("\n");
  const lost = written.filter((line) => line.startsWith("#"));
  const events = written.filter((line) => !line.startsWith("#")).map(parseEvent);
  return { events, lost, warnings, time };
}

test("what the guest maps is written down at the host's time", async (t) => {
  const { events, lost, warnings, time } = await record(t, {
    lines: (now) => ["# tracer: nop", mapped(now)],
  });
  assert.deepEqual([lost, warnings], [[], []]);
  const [event, ...more] = events;
  const source = { cpu: 0, endpoint: 0x20 as Bdf };
  assert.deepEqual({ ...event, time: 0 }, { time: 0, kind: "map", source, ranges: [[5, 1]] });
  assert.ok(Math.abs(event!.time - time) < 2e6, `mapped at ${time}, written down as ${event!.time}`);
  assert.equal(more.length, 0);
});

test("events that the guest's buffer lost, and lines that are none, are told in one number", async (t) => {
  const { events, lost, warnings } = await record(t, {
    lines: (now) => [mapped(now), "nonsense", mapped(now, 1), "x".repeat(1000)],
    stats: "entries: 3\noverrun: 1\ncommit overrun: 2\ndropped events: 30\nentries: 2\ndropped events: 400\n",
  });
  assert.equal(events.length, 1);
  assert.deepEqual(lost, ["# lost 437"]);
  // Of five events four are not there; 433 had no room.
  assert.equal(warnings.length, 1);
  assert.match(
    warnings[0]!,
    /lacks 437 of the guest's map and unmap events; its buffer for 433 of them was full/,
  );
});

test("a guest that sends more than it says is told as well", async (t) => {
  const { events, warnings } = await record(t, {
    lines: (now) => [mapped(now), "nonsense", "nonsense"],
    stats: "entries: 1\n",
  });
  assert.equal(events.length, 1);
  assert.deepEqual(warnings, ["the recording lacks 2 of the guest's map and unmap events"]);
});

const bufferSize = (MEMORY_MIB * 2 ** 20) / 8;
for (const [what, said, complaint] of [
  ["is no gzip", { packed: Buffer.from("nonsense") }, /arrived damaged/],
  ["ends too early", { packed: gzipSync("x".repeat(1000)).subarray(0, -9) }, /arrived damaged/],
  ["is shorter than it was said to be", { size: "100" }, /arrived damaged/],
  ["is larger than the buffer can have been", { size: String(bufferSize + 1) }, /trace: 131073$/],
  ["has no size", { size: "stat: cannot stat\n" }, /trace: stat: cannot stat$/],
  ["unpacks to gigabytes", { packed: gzipSync(Buffer.alloc(64 * 2 ** 20, "\n")) }, /too long/],
] as const)
  test(`a trace that ${what} ends the recording of the guest with one sentence`, async (t) => {
    const { warnings } = await record(t, said);
    assert.equal(warnings.length, 1);
    assert.match(warnings[0]!, /^the recording lacks what the guest mapped: /);
    assert.match(warnings[0]!, complaint);
  });

test("a guest without marks is refused", async (t) => {
  await assert.rejects(record(t, { marks: "" }), /no marks of its clock/);
});
