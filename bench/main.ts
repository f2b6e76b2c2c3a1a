/** `npm run bench -- NAME`: measures, prints a table, writes JSON and a plot. */
import { mkdirSync, writeFileSync } from "node:fs";
import { cpus } from "node:os";
import { dirname, relative } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import Table from "cli-table3";
import type { Series, Spread } from "./compare.ts";
import { type HotPathCase, hotPath } from "./hot-path.ts";
import { barPlot } from "./plot.ts";

const USAGE = `usage: npm run bench -- hot-path [--rounds N] [--json FILE] [--svg FILE]`;

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
    json: { type: "string", default: results("hot-path.json") },
    svg: { type: "string", default: results("hot-path.svg") },
  },
});
const rounds = Number(values.rounds);
if (positionals.join() !== "hot-path" || !(Number.isInteger(rounds) && rounds > 0)) {
  console.error(USAGE);
  process.exit(2);
}

const report: Report = {
  bench: "hot-path",
  machine: {
    cpu: cpus()[0]?.model ?? "unknown",
    cpus: cpus().length,
    node: process.version,
    v8: process.versions.v8,
  },
  rounds,
  cases: await hotPath(rounds, console.error),
};
console.log(table(report));
write(values.json, `${JSON.stringify(report, null, 2)}\n`);
write(values.svg, plot(report));

function results(name: string): string {
  return fileURLToPath(new URL(`results/${name}`, import.meta.url));
}

function write(file: string, text: string): void {
  mkdirSync(dirname(file), { recursive: true });
  writeFileSync(file, text);
  console.log(relative(process.cwd(), file));
}

function table({ rounds, machine, cases }: Report): string {
  const range = ({ min, median, max }: Spread) => [min, median, max].map((n) => n.toFixed(1)).join(" / ");
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
