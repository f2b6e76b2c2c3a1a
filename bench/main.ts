/** `npm run bench -- NAME`, or `coiommu bench NAME`: measures, prints a table, writes JSON and a plot. */
import { mkdirSync, writeFileSync } from "node:fs";
import { cpus } from "node:os";
import { dirname, relative } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { extents } from "./extents.ts";
import { hotPath } from "./hot-path.ts";
import { pass } from "./pass.ts";
import { policies } from "./policies.ts";
import { policiesLive } from "./policies-live.ts";
import * as reports from "./reports.ts";
import { vfio } from "./vfio/main.ts";

const USAGE = `usage: coiommu bench NAME, or in a checkout npm run bench -- NAME; results in bench/results, or --json FILE
  hot-path|extents|pass [--rounds N]
  policies [WORKLOAD…] [--logs FOLDER (kept, and replayed if there)]
  policies-live [WORKLOAD…]
  vfio [--device BDF (of this machine, instead of a VM's)] [--rounds N]`;

const { positionals, values } = given();
const [name, ...more] = positionals;
const rounds = Number(values.rounds ?? (name === "vfio" ? 21 : 61));
const machine: reports.Machine = {
  cpu: cpus()[0]?.model ?? "unknown",
  cpus: cpus().length,
  node: process.version,
  v8: process.versions.v8,
};
if (!(Number.isInteger(rounds) && rounds > 0) || (more.length > 0 && !name?.startsWith("policies")))
  wrongUsage();
const say = console.error;
switch (name) {
  case "hot-path":
    tell({ bench: name, machine, rounds, cases: await hotPath(rounds, say) }, reports.hotPath);
    break;
  case "extents":
    tell({ ...extents(rounds), machine }, reports.extents);
    break;
  case "pass":
    tell({ ...pass(rounds), machine }, reports.pass);
    break;
  case "policies":
    tell({ ...(await policies(values.logs ?? results("logs"), more, say)), machine }, reports.policies);
    break;
  case "policies-live":
    tell({ ...(await policiesLive(more, say)), machine }, reports.policiesLive);
    break;
  case "vfio":
    tell({ ...(await vfio(values.device, rounds, say)), machine }, reports.vfio);
    break;
  default:
    wrongUsage();
}

function given() {
  try {
    return parseArgs({
      allowPositionals: true,
      options: {
        ...{ rounds: { type: "string" }, json: { type: "string" }, logs: { type: "string" } },
        device: { type: "string" },
      },
    });
  } catch (error) {
    return wrongUsage((error as Error).message);
  }
}

function wrongUsage(...wrong: string[]): never {
  for (const line of [...wrong, USAGE]) console.error(line);
  process.exit(2);
}

function tell<R extends { readonly bench: string }>(report: R, write: (report: R) => reports.Written): void {
  const { text, plots } = write(report);
  console.log(text);
  save(`${JSON.stringify(report, null, 2)}\n`, values.json ?? results(`${report.bench}.json`));
  for (const [file, svg] of Object.entries(plots)) save(svg, results(file));
}

function results(file: string): string {
  return fileURLToPath(new URL(`results/${file}`, import.meta.url));
}

function save(text: string, file: string): void {
  mkdirSync(dirname(file), { recursive: true });
  writeFileSync(file, text);
  console.log(relative(process.cwd(), file));
}
