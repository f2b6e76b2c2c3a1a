import assert from "node:assert/strict";
import test from "node:test";
import type { Bdf, Gfn } from "../base/units.ts";
import { EventLogWriter, formatEvent, type LoggedEvent, parseEvent } from "./event-log.ts";

const events: readonly LoggedEvent[] = [
  { time: 0, kind: "map", source: { cpu: 0, endpoint: 0x20 as Bdf }, ranges: [[0x1a2b, 1]] },
  {
    time: 2 ** 50,
    kind: "unmap",
    source: { cpu: 63, endpoint: 0xffff as Bdf },
    ranges: [
      [0, 1],
      [2 ** 40 - 512, 512],
    ],
  },
  { time: 17, kind: "pinned", source: null, ranges: [[5, 3]] },
  {
    time: 18,
    kind: "unpinned",
    source: null,
    ranges: [
      [5, 1],
      [7, 1],
    ],
  },
];

test("events are read back as they were written", () => {
  for (const event of events) assert.deepEqual(parseEvent(formatEvent(event).trimEnd()), event);
  assert.equal(formatEvent(events[1]!), "1125899906842624 63 0000:ff:1f.7 unmap 0 fffffffe00+512\n");
});

for (const line of [
  "",
  "1 0 0000:00:04.0 map",
  "x 0 0000:00:04.0 map 1",
  "-1 0 0000:00:04.0 map 1",
  "1 0 0000:00:04.0 Map 1",
  "1 - 0000:00:04.0 map 1",
  "1 0 - map 1",
  "1 0 0000:00:04.9 map 1",
  "1 0 0000:00:04.0 map 1+0",
  "1 0 0000:00:04.0 map 1  2",
  "1 0 0000:00:04.0 map g",
  "1 0 0000:00:04.0 map ffffffffff+2",
  `1 0 0000:00:04.0 map ${"1 ".repeat(70_000)}1`,
])
  test(`"${line.slice(0, 40)}" is no event`, () => assert.equal(parseEvent(line), undefined));

test("frames of one moment are one line, neighbours one range; flush hands on what is there", () => {
  const pieces: string[] = [];
  const log = new EventLogWriter(100, (lines) => pieces.push(lines));
  for (const gfn of [5, 6, 9]) log.addFrame(gfn as Gfn, "pinned", 110);
  log.addFrame(9 as Gfn, "unpinned", 110);
  log.addFrame(5 as Gfn, "pinned", 120);
  assert.deepEqual(pieces, []);
  log.flush();
  assert.deepEqual(pieces.join(""), "10 - - pinned 5+2 9\n10 - - unpinned 9\n20 - - pinned 5\n");
  log.flush();
  assert.equal(pieces.length, 1);
});

test("many events are handed on in pieces of whole lines", () => {
  const pieces: string[] = [];
  const log = new EventLogWriter(0, (lines) => pieces.push(lines));
  for (let time = 0; time < 10_000; time++) log.add({ ...events[0]!, time });
  log.flush();
  assert.ok(pieces.length > 2 && pieces.every((p) => p.endsWith("\n") && p.length < 70_000));
  assert.equal(pieces.join("").trimEnd().split("\n").length, 10_000);
});
