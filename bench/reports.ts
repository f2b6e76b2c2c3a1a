/** What is printed and drawn of measurements. */
import Table from "cli-table3";
import type { Series, Spread } from "./compare.ts";
import type { ExtentsReport } from "./extents.ts";
import type { HotPathCase } from "./hot-path.ts";
import type { Distribution, PassReport } from "./pass.ts";
import { barPlot, pointPlot } from "./plot.ts";
import type { Point, PoliciesReport, PolicyWorkload } from "./policies.ts";
import type { LiveReport } from "./policies-live.ts";
import type { VfioReport } from "./vfio/report.ts";

export interface Machine {
  readonly cpu: string;
  readonly cpus: number;
  readonly node: string;
  readonly v8: string;
}
export interface Written {
  readonly text: string;
  /** SVG by file name. */
  readonly plots: Readonly<Record<string, string>>;
}

const NAMES = { c: "C (units.c)", atomics: "V8's Atomics alone", typescript: "TypeScript (units.ts)" };
type Name = keyof typeof NAMES;

export function hotPath({
  rounds,
  machine,
  cases,
}: {
  readonly bench: string;
  readonly machine: Machine;
  readonly rounds: number;
  readonly cases: readonly HotPathCase[];
}): Written {
  const on = `${machine.cpu}, Node ${machine.node}`;
  const rows = table("", "", "ns per frame", "times C");
  for (const { what, series } of cases)
    for (const [name, { time, ratio }] of Object.entries(series) as [Name, Series][])
      rows.push([name === "c" ? what : "", NAMES[name], range(time), name === "c" ? "" : range(ratio)]);
  const plot = barPlot({
    title: "Map and unmap of a pinned frame",
    subtitle: `median of ${rounds} rounds, whiskers min to max, above: times C; ${on}`,
    unit: "ns per frame",
    categories: cases.map((c) => c.what),
    series: (Object.keys(NAMES) as Name[]).map((name) => ({
      name: NAMES[name],
      values: cases.map((c) => c.series[name].time),
      labels: cases.map((c) => (name === "c" ? "" : `${c.series[name].ratio.median.toFixed(1)}×`)),
    })),
  });
  return {
    text: `map + unmap of a pinned frame: min / median / max of ${rounds} rounds; ${on}\n${rows}`,
    plots: { "hot-path.svg": plot },
  };
}

export function extents({ rounds, frames, pin, unpin }: ExtentsReport): Written {
  const rows = table("ns per frame", "each in a slot", "extents", "ratio");
  for (const [what, { apart, together }] of [
    ["pin", pin],
    ["unpin as a whole", unpin.whole],
    ["unpin every fourth, four times", unpin.fourths],
    ["unpin one by one, in no order", unpin.single],
  ] as const)
    rows.push([what, range(apart.time), range(together.time), range(together.ratio, 2)]);
  return { text: `PIN of ${frames} frames: min / median / max of ${rounds} rounds\n${rows}`, plots: {} };
}

export function pass(report: PassReport & { readonly machine: Machine }): Written {
  const { rounds, frames, limitUs, overLimit, slice, reference, request, passMs, curves, machine } = report;
  const rows = table("us", "p50", "p99", "p99.9", "max");
  const row = (what: string, d: Distribution) =>
    rows.push([what, ...[d.p50, d.p99, d.p999, d.max].map((us) => us.toFixed(1))]);
  row("a slice of the pass", slice);
  row("a loop that takes as long", reference);
  row("a PIN request between slices", request.duringPass);
  row("a PIN request without a pass", request.alone);
  const title = `${rounds} unpin passes over ${frames.toLocaleString("en-US")} frames, none idle`;
  return {
    text:
      `${title}: ${range(passMs)} ms each; ${(100 * overLimit.slice).toFixed(2)} % of the slices took more than ` +
      `${limitUs} us, and ${(100 * overLimit.reference).toFixed(2)} % of the loops\n${rows}`,
    plots: {
      "pass.svg": pointPlot({
        title: "What a PIN request waits for at most",
        subtitle: `${title}; ${machine.cpu}, Node ${machine.node}`,
        x: { name: "us", log: true },
        y: { name: "share that took at most so long", max: 1 },
        series: [
          { name: "a slice of the pass", line: true, points: curves.slice },
          { name: "a loop that takes as long", line: true, points: curves.reference },
        ],
      }),
    },
  };
}

export function policies({ workloads }: PoliciesReport): Written {
  const texts = workloads.map((w) => {
    const rows = table(
      ...["policy", "speculation", "interval", "exits / 1,000 maps", "after 1 s"],
      ...["mean MiB", "peak MiB", "of optimal", "used", "wasted"],
    );
    for (const p of w.points)
      rows.push([
        ...[p.policy, p.speculate + (p.stopped ? " (stopped)" : ""), p.interval],
        ...[figure(p.per1000), figure(p.steadyPer1000), figure(p.meanMiB), figure(p.peakMiB)],
        p.ofOptimal === null ? "-" : `${p.ofOptimal.toFixed(3)}x`,
        ...(p.speculate === "off" ? ["", ""] : [p.saved, p.wasted]),
      ]);
    return `${w.name}: ${w.workload}, ${w.events} events in ${w.seconds.toFixed(1)} s\n${rows}\n`;
  });
  return {
    text: texts.join("\n"),
    plots: Object.fromEntries(workloads.map((w) => [`policies-${w.name}.svg`, paretoOf(w)])),
  };
}

export function policiesLive({ runs }: LiveReport): Written {
  const rows = table(
    "workload",
    "policy",
    "speculation",
    "exits / 1,000 maps",
    "after 1 s",
    "mean MiB",
    "peak MiB",
    "I/O per s",
    "wrong",
  );
  for (const r of runs)
    rows.push([
      ...[r.workload, r.policy, r.speculate, figure(r.per1000), figure(r.steadyPer1000)],
      ...[figure(r.meanMiB), figure(r.peakMiB), figure(r.iops), r.wrong],
    ]);
  return { text: `one run each, live\n${rows}`, plots: {} };
}

export function vfio({ kernel, rounds, pins, entries, creation }: VfioReport): Written {
  const calls = table("ns per frame", "C", "pinner", "over C", "backend", "over C");
  for (const { what, pin, unpin } of pins)
    for (const [name, of] of [
      ["pin", pin],
      ["unpin", unpin],
    ] as const)
      calls.push([
        ...[`${name}, ${what}`, range(of.c.time, 0), range(of.pinner.time, 0), range(of.pinner.ratio, 2)],
        ...[range(of.backend.time, 0), range(of.backend.ratio, 2)],
      ]);
  const reach = table("touched", "MiB", "pinned MiB", "beyond need", "mappings", "per MiB", "ended by");
  reach.push([
    "page by page",
    figure(entries.pageWise.pinnedMiB),
    figure(entries.pageWise.pinnedMiB),
    "0 %",
    entries.limit ?? "-",
    256,
    "no mapping left",
  ]);
  for (const c of entries.cases)
    reach.push([
      ...[c.how, figure(c.touchedMiB), figure(c.pinnedMiB), `${figure(c.beyondNeedPercent)} %`],
      ...[c.mappings, figure(c.mappingsPerMiB), c.ended],
    ]);
  const times = table(
    "guest",
    "static, ms",
    "coiommu, ms",
    "static / coiommu",
    "pinned before: static, ms",
    "coiommu, ms",
  );
  for (const c of creation)
    times.push([
      ...[`${c.memoryMiB} MiB`, range(c.static), range(c.coiommu), range(c.ratio, 2)],
      ...[range(c.pinMs.static), range(c.pinMs.coiommu)],
    ]);
  return {
    text:
      `pins through VFIO, Linux ${kernel}: min / median / max of ${rounds} rounds\n${calls}\n` +
      `${entries.limit} mappings, a guest of ${entries.ramMiB} MiB\n${reach}\n` +
      `until the driver has its disk: min / median / max\n${times}`,
    plots: {
      "vfio-creation.svg": barPlot({
        title: "Creating a guest with a VFIO device",
        subtitle: `until its driver has the disk, median, whiskers min to max; above: static over coiommu; Linux ${kernel}`,
        unit: "ms",
        categories: creation.map((c) => `${c.memoryMiB} MiB`),
        series: [
          { name: "coiommu", values: creation.map((c) => c.coiommu), labels: creation.map(() => "") },
          {
            name: "static",
            values: creation.map((c) => c.static),
            labels: creation.map((c) => `${c.ratio.median.toFixed(1)}×`),
          },
        ],
      }),
    },
  };
}

function paretoOf({ name, workload, seconds, points, optimal }: PolicyWorkload): string {
  const speculating = (p: Point) => p.policy === "lru" && p.speculate !== "off";
  const shown = points.filter((p) => p.speculate === "off" || speculating(p));
  const bySeries = Map.groupBy(shown, (p) => (speculating(p) ? `lru + ${p.speculate}` : p.policy));
  return pointPlot({
    title: `${name}: pinned memory against exits`,
    subtitle: `${workload}, ${seconds.toFixed(0)} s; a dot for each interval between passes; the line: what no policy on request beats`,
    x: { name: "mappings that ask, per 1,000", log: true },
    y: { name: "pinned on average, MiB" },
    series: [
      { name: "optimal", line: true, points: optimal },
      ...[...bySeries].map(([name, of]) => ({
        name,
        line: false,
        points: of.map((p): [number, number] => [p.asksPer1000, p.meanMiB]),
      })),
    ],
  });
}

const figure = (n: number | null): string =>
  n === null ? "-" : n >= 100 ? n.toFixed(0) : String(Number(n.toPrecision(3)));

const table = (...head: string[]): Table.Table =>
  new Table({ head, style: { head: [], border: [], compact: true } });

function range({ min, median, max }: Spread, digits = 1): string {
  return [min, median, max].map((n) => n.toFixed(digits)).join(" / ");
}
