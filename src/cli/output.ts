import { writeFileSync } from "node:fs";
import Table from "cli-table3";
import { UserError } from "../base/errors.ts";
import { FRAME_SIZE } from "../base/units.ts";
import type { RunResult } from "../control/result.ts";

/** `--json FILE|-`. */
export function writeJson(target: string | undefined, result: unknown): void {
  if (target === undefined) return;
  const text = `${JSON.stringify(result, null, 2)}\n`;
  if (target === "-") {
    process.stdout.write(text);
    return;
  }
  try {
    writeFileSync(target, text);
  } catch (error) {
    throw new UserError(`--json ${target}: ${(error as Error).message}`, 1);
  }
}

const median = (values: readonly number[]): number => {
  const sorted = values.toSorted((a, b) => a - b);
  const middle = Math.floor(sorted.length / 2);
  return sorted.length % 2 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
};

export const number = (n: number): string =>
  n >= 100 ? Math.round(n).toLocaleString("en-US") : String(Number(n.toPrecision(3)));
const mib = (frames: number): string => number((frames * FRAME_SIZE) / 2 ** 20);

/** One row: what it says, and its value in a run; null where the strategy does not have it. */
interface Row {
  readonly label: string;
  readonly of: (run: RunResult) => number | null;
  readonly show?: (n: number) => string;
  /** Beside the value, the ratio to the first strategy that has one. */
  readonly ratio?: boolean;
  /** Summed over the rounds instead of the median: what must be 0 must be 0 in each. */
  readonly sum?: boolean;
}

const perMapping = ({ steady }: RunResult, n: number | null): number | null =>
  steady?.maps && n !== null ? (1000 * n) / steady.maps : null;

const ROWS: readonly Row[] = [
  { label: "pinned before the guest starts, ms", of: (r) => r.creation.pinMs, ratio: true },
  { label: "to user space, ms", of: (r) => r.creation.toUserspaceMs, ratio: true },
  { label: "I/O per second", of: (r) => r.workload.iops, ratio: true },
  { label: "latency p50, us", of: (r) => r.workload.latencyUs?.p50 ?? null, ratio: true },
  { label: "latency p99, us", of: (r) => r.workload.latencyUs?.p99 ?? null, ratio: true },
  { label: "pinned at most, MiB", of: (r) => r.pins.framesPeak, show: mib },
  {
    label: "pinned at most, % of guest memory",
    of: (r) => (100 * r.pins.framesPeak * FRAME_SIZE) / (r.guest.memoryMiB * 2 ** 20),
  },
  { label: "pinned on average, MiB", of: (r) => r.pins.framesMean, show: mib },
  {
    label: "pinned at most says the kernel, MiB",
    of: (r) => r.kernel.pinnedPagesPeak,
    show: mib,
  },
  {
    label: "pinned beyond need at most, MiB",
    of: (r) => r.kernel.mappings?.framesBeyondNeedPeak ?? null,
    show: mib,
  },
  { label: "mappings of the IOMMU at most", of: (r) => r.kernel.mappings?.peak ?? null },
  { label: "mappings that the kernel allows", of: (r) => r.kernel.mappings?.limit ?? null },
  { label: "pinned and never transferred, MiB", of: (r) => r.pins.framesNeverTransferred, show: mib },
  { label: "DMA mappings", of: (r) => r.maps.map },
  { label: "pin requests (exits)", of: (r) => r.pins.requests },
  {
    label: "pin requests per 1,000 mappings, after 1 s",
    of: (r) => perMapping(r, r.steady?.pinRequests ?? null),
  },
  {
    label: "MAP and UNMAP requests",
    of: ({ maps: { mapRequests, unmapRequests } }) =>
      mapRequests === null || unmapRequests === null ? null : mapRequests + unmapRequests,
  },
  { label: "exits for them", of: (r) => r.maps.exits },
  {
    label: "exits for them per 1,000 mappings, after 1 s",
    of: (r) => perMapping(r, r.steady?.exits ?? null),
  },
  { label: "frames that came back soon", of: (r) => r.pins.framesCameBack },
  { label: "frames pinned unasked", of: ({ pins }) => pins.framesSpeculative || null },
  { label: "of them used", of: (r) => (r.pins.framesSpeculative ? r.pins.speculation!.saved : null) },
  {
    label: "of them unpinned unused",
    of: (r) => (r.pins.framesSpeculative ? r.pins.speculation!.wasted : null),
  },
  { label: "pin requests refused", of: (r) => r.pins.refused, sum: true },
  { label: "DMA faults", of: (r) => r.dma.faults, sum: true },
  { label: "I/O errors", of: (r) => r.workload.errors, sum: true },
];

/** Rows of a label and what belongs to each column, colours only on a terminal. */
function newTable(head: readonly string[]): Table.Table {
  return new Table({
    head: [...head],
    colAligns: head.map((_, i) => (i === 0 ? "left" : "right")),
    style: { head: process.stdout.isTTY ? ["bold"] : [], border: process.stdout.isTTY ? ["grey"] : [] },
  });
}

export function plainTable(head: readonly string[], rows: readonly (readonly string[])[]): string {
  const out = newTable(head);
  out.push(...rows.map((row) => [...row]));
  return out.toString();
}

/** Strategies side by side, the median over the rounds; rows that no strategy has are left out. */
export function table(runs: readonly RunResult[]): string {
  const strategies = [...new Set(runs.map((r) => r.strategy))];
  const out = newTable(["", ...strategies]);
  for (const row of ROWS) {
    const values = strategies.map((strategy) => {
      const of = runs
        .filter((r) => r.strategy === strategy)
        .map(row.of)
        .filter((n) => n !== null);
      return of.length === 0 ? null : row.sum ? of.reduce((a, b) => a + b) : median(of);
    });
    if (values.every((v) => v === null)) continue;
    const base = row.ratio && strategies.length > 1 ? values.find((v) => v !== null) : undefined;
    out.push([
      row.label,
      ...values.map((v) => (v === null ? "-" : (row.show ?? number)(v) + ratioTo(base, v))),
    ]);
  }
  return out.toString();
}

const ratioTo = (base: number | null | undefined, value: number): string =>
  base ? `  (${(value / base).toFixed(2)}x)`.padStart(11) : "";
