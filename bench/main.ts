/** `npm run bench -- NAME`: measures, prints a table, writes JSON and a plot. */
import { mkdirSync, writeFileSync } from "node:fs";
import { cpus } from "node:os";
import { dirname, relative } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import Table from "cli-table3";
import type { Series, Spread } from "./compare.ts";
import { type ExtentsReport, extents } from "./extents.ts";
import { type HotPathCase, hotPath } from "./hot-path.ts";
import { barPlot } from "./plot.ts";

const USAGE = `usage: npm run bench -- hot-path|extents [--rounds N] [--json FILE] [--svg FILE (hot-path)]`;

const NAMES = { c: "C (units.c)", atomics: "V8's Atomics alone", typescript: "TypeScript (units.ts)" };
type Name = keyof typeof NAMES;

interface Report {
  readonly bench: "hot-path";
  readonly machine: {
    readonly cpu: string;
    readonly cpus: number;
    readonly node: string;
    readonly v8: string;
  };
  readonly rounds: number;
  readonly cases: readonly HotPathCase[];
}

const { positionals, values } = parseArgs({
  allowPositionals: true,
  options: {
    rounds: { type: "string", default: "61" },
    json: { type: "string" },
    svg: { type: "string", default: results("hot-path.svg") },
  },
});
const rounds = Number(values.rounds);
const name = positionals.join();
const machine = {
  cpu: cpus()[0]?.model ?? "unknown",
  cpus: cpus().length,
  node: process.version,
  v8: process.versions.v8,
};
if (!(Number.isInteger(rounds) && rounds > 0) || (name !== "hot-path" && name !== "extents")) {
  console.error(USAGE);
  process.exit(2);
}
if (name === "hot-path") {
  const report: Report = { bench: name, machine, rounds, cases: await hotPath(rounds, console.error) };
  console.log(table(report));
  write(`${JSON.stringify(report, null, 2)}\n`, values.json ?? results("hot-path.json"));
  write(plot(report), values.svg);
} else {
  const report = { ...extents(rounds), machine };
  console.log(extentsTable(report));
  write(`${JSON.stringify(report, null, 2)}\n`, values.json ?? results("extents.json"));
}

function results(name: string): string {
  return fileURLToPath(new URL(`results/${name}`, import.meta.url));
}

function write(text: string, file: string): void {
  mkdirSync(dirname(file), { recursive: true });
  writeFileSync(file, text);
  console.log(relative(process.cwd(), file));
}

function range({ min, median, max }: Spread, digits = 1): string {
  return [min, median, max].map((n) => n.toFixed(digits)).join(" / ");
}

function extentsTable({ rounds, frames, pin, unpin }: ExtentsReport): string {
  const rows = new Table({
    head: ["ns per frame", "each in a slot", "extents", "ratio"],
    style: { head: [], border: [], compact: true },
  });
  for (const [what, { apart, together }] of [
    ["pin", pin],
    ["unpin as a whole", unpin.whole],
    ["unpin every fourth, four times", unpin.fourths],
    ["unpin one by one, in no order", unpin.single],
  ] as const)
    rows.push([what, range(apart.time), range(together.time), range(together.ratio, 2)]);
  return `PIN of ${frames} frames: min / median / max of ${rounds} rounds\n${rows}`;
}

function table({ rounds, machine, cases }: Report): string {
  const rows = new Table({
    head: ["", "", "ns per frame", "times C"],
    style: { head: [], border: [], compact: true },
  });
  for (const { what, series } of cases)
    for (const [name, { time, ratio }] of Object.entries(series) as [Name, Series][])
      rows.push([name === "c" ? what : "", NAMES[name], range(time), name === "c" ? "" : range(ratio)]);
  return `map + unmap of a pinned frame: min / median / max of ${rounds} rounds; ${machine.cpu}, Node ${machine.node}\n${rows}`;
}

function plot({ rounds, machine, cases }: Report): string {
  return barPlot({
    title: "Map and unmap of a pinned frame",
    subtitle: `median of ${rounds} rounds, whiskers min to max, above: times C; ${machine.cpu}, Node ${machine.node}`,
    unit: "ns per frame",
    categories: cases.map((c) => c.what),
    series: (Object.keys(NAMES) as Name[]).map((name) => ({
      name: NAMES[name],
      values: cases.map((c) => c.series[name].time),
      labels: cases.map((c) => (name === "c" ? "" : `${c.series[name].ratio.median.toFixed(1)}×`)),
    })),
  });
}
