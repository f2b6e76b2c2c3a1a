import assert from "node:assert/strict";
import { test } from "node:test";
import type { Bdf, Nanoseconds } from "../../base/units.ts";
import { findMark, type TracedOperation, TraceReader } from "./trace-text.ts";

const seconds = (n: number) => (n * 1e9) as Nanoseconds;
const BOUNDS = { cpus: 2, frames: 0x1000, from: seconds(4), to: seconds(6) };

function read(lines: readonly string[]) {
  const operations: TracedOperation[] = [];
  const reader = new TraceReader(BOUNDS, (operation) => operations.push(operation));
  for (const line of lines) reader.line(line);
  reader.end();
  return { operations, segments: reader.segments, malformed: reader.malformed };
}

/** As tracefs shows it. */
const line = (event: string, cpu = 0, time = "5.000000") =>
  `           <...>-190     [00${cpu}]      ${time}: ${event}`;
const map = (addr: string, size: number, left = 0, kind = "map") =>
  `coiommu_${kind}: 0000:00:04.0 addr=${addr} size=${size} left=${left}`;
const SOUND = line(map("1000", 1));

test("mappings are read with CPU, time, function and the frames that they touch", () => {
  const text = [
    "# tracer: nop",
    "#              | |         |         |         |",
    line(map("1c7110", 16), 0, "5.000001"),
    "          <idle>-0       [001]      5.000002: coiommu_unmap: 0000:1f:03.2 addr=ffe size=4098 left=0",
  ];
  assert.deepEqual(read(text), {
    operations: [
      { time: 5_000_001_000, kind: "map", source: { cpu: 0, endpoint: 0x20 as Bdf }, ranges: [[0x1c7, 1]] },
      { time: 5_000_002_000, kind: "unmap", source: { cpu: 1, endpoint: 0x1f1a as Bdf }, ranges: [[0, 2]] },
    ],
    segments: 2,
    malformed: 0,
  });
});

test("a list is one operation, whatever other CPUs do meanwhile", () => {
  const { operations, segments, malformed } = read([
    line(map("1000", 4096, 2), 0, "5.000001"),
    line(map("5000", 1, 0, "unmap"), 1, "5.000001"),
    line(map("3000", 8192, 1), 0, "5.000002"),
    line(map("7000", 1, 1), 1, "5.000002"),
    line(map("2000", 1, 0), 0, "5.000003"),
    line(map("6000", 1, 0), 1, "5.000003"),
  ]);
  assert.deepEqual([segments, malformed], [6, 0]);
  assert.deepEqual(
    operations.map(({ time, kind, source, ranges }) => [time / 1e3, kind, source.cpu, ranges]),
    [
      [5_000_001, "unmap", 1, [[5, 1]]],
      [
        ...[5_000_001, "map", 0],
        [
          [1, 1],
          [3, 2],
          [2, 1],
        ],
      ],
      [
        ...[5_000_002, "map", 1],
        [
          [7, 1],
          [6, 1],
        ],
      ],
    ],
  );
});

for (const [what, first, next, left] of [
  ["ends with the trace", line(map("1000", 1, 2)), undefined, 0],
  ["jumps over a segment", line(map("1000", 1, 3)), line(map("1000", 1, 1)), 0],
  ["repeats a segment", line(map("1000", 1, 3)), line(map("1000", 1, 3)), 0],
  ["is interrupted by a mapping", line(map("1000", 1, 2)), SOUND, 1],
  ["is continued by an unmap", line(map("1000", 1, 1)), line(map("1000", 1, 0, "unmap")), 1],
  ["is continued by another function", line(map("1000", 1, 1)), SOUND.replace("04.0", "05.0"), 1],
] as const)
  test(`a list that ${what} is left out and counted`, () => {
    const text = next === undefined ? [first] : [first, next];
    const { operations, segments, malformed } = read(text);
    assert.deepEqual([operations.length, segments, malformed], [left, left, text.length - left]);
  });

test("what is no event of ours, or breaks a bound, is left out and counted", () => {
  const hostile = [
    "x",
    "\0".repeat(300),
    "CPU:1 [LOST 12 EVENTS]",
    line("sched_switch: prev_comm=sh"),
    line("coiommu_map:"),
    line("constructor: 0000:00:04.0 addr=1000 size=1 left=0"),
    line("__proto__: 0000:00:04.0 addr=1000 size=1 left=0"),
    line(`${map("1000", 1)} `),
    line(map("1000", 1)).slice(0, -1),
    line(map("-1", 1)),
    line(map("1g", 1)),
    line(map("", 1)),
    line(map("10000000000000", 1)),
    line(map("1000000", 1)), // the first byte beyond the guest's frames
    line(map("ffffff", 2)),
    line(map("fffffffffffff", 1)),
    line(map("1000", 0)),
    line(map("1000", -1)),
    line(map("1000", 2 ** 52)),
    line(map("1000", 1.5)),
    line(map("1000", 1, -1)),
    line(map("1000", 1, 65_536)),
    line(map("1000", 1, 99_999)),
    line(map("1000", 1, 100_000)),
    SOUND.replace("0000:00:04.0", "0001:00:04.0"),
    SOUND.replace("0000:00:04.0", "0000:00:24.0"),
    SOUND.replace("0000:00:04.0", "0000:00:04.8"),
    SOUND.replace("[000]", "[002]"), // there are two CPUs
    SOUND.replace("[000]", "[0]"),
    SOUND.replace("[000]", "[99999]"),
    line(map("1000", 1), 0, "3.999999"),
    line(map("1000", 1), 0, "6.000001"),
    line(map("1000", 1), 0, "99999999999.000000"),
    line(map("1000", 1), 0, "5.0"),
    `${"<".repeat(100)}${SOUND}`,
  ];
  for (const text of hostile)
    assert.deepEqual(read([text]), { operations: [], segments: 0, malformed: 1 }, JSON.stringify(text));
  const { operations, malformed } = read(hostile.flatMap((text) => [text, SOUND]));
  assert.deepEqual([operations.length, malformed], [hostile.length, hostile.length]);
});

test("the last frame, the first moment and the longest list are within the bounds", () => {
  const { operations, malformed } = read([
    line(map("fff000", 4096), 0, "4.000000"),
    line(map("0", 0x1000000), 0, "6.000000"),
    ...Array.from({ length: 65_536 }, (_, i) => line(map("1000", 1, 65_535 - i), 1)),
  ]);
  assert.equal(malformed, 0);
  assert.deepEqual(
    operations.map(({ ranges }) => ranges.length),
    [1, 1, 65_536],
  );
  assert.deepEqual(operations[1]!.ranges, [[0, 0x1000]]);
});

test("time does not go back on a CPU, and may between CPUs", () => {
  const { operations, malformed } = read([
    line(map("1000", 1), 0, "5.000002"),
    line(map("2000", 1), 0, "5.000001"),
    line(map("3000", 1), 1, "5.000001"),
    line(map("4000", 1), 0, "5.000002"),
  ]);
  assert.equal(malformed, 1);
  assert.deepEqual(
    operations.map(({ ranges }) => ranges[0]![0]),
    [1, 3, 4],
  );
});

test("a mark is found by its number, among others and among what is none", () => {
  const trace = [
    "# tracer: nop",
    "17",
    line("tracing_mark_write: 7"),
    line("tracing_mark_write: 17", 1, "4.000009"),
  ];
  assert.equal(findMark(trace.join("\n"), 17), 4_000_009_000);
  assert.equal(findMark(trace.join("\n"), 18), undefined);
  assert.equal(findMark(line("other: 18"), 18), undefined);
});
