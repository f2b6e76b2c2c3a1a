import { execFileSync } from "node:child_process";
import { setImmediate } from "node:timers/promises";
import { Command } from "commander";
import { UserError } from "../base/errors.ts";
import { type Failure, shorten, simulate } from "../sim/simulate.ts";
import type { WorldStatistics } from "../sim/statistics.ts";
import { number, plainTable, writeJson } from "./output.ts";
import { Progress } from "./progress.ts";
import { parseCount } from "./units.ts";

interface SimOptions {
  readonly seed?: number;
  readonly seeds?: number;
  readonly steps: number;
  readonly json?: string;
}

/** `coiommu sim --json`. Statistics are sums over the seeds. */
interface SimResult {
  readonly schema: "coiommu.sim/1";
  readonly commit: string | null;
  readonly seed: number;
  readonly seeds: number;
  readonly stepsPerSeed: number;
  readonly stepsPerSecond: number;
  readonly statistics: WorldStatistics;
  readonly failure: Pick<Failure, "seed" | "steps" | "message"> | null;
}

const EXAMPLES = `
Examples:
  coiommu sim                              a hundred machines with new seeds
  coiommu sim --seed 17 --steps 1234       play one machine again, as a failure asks for
  coiommu sim --seed 1 --seeds 1000        what the tests do`;

export const simCommand = (): Command =>
  new Command("sim")
    .description("Whole machines in one thread, under every interleaving and fault that a seed brings about.")
    .option("--seed <n>", "of the first machine (default: a new one)", parseCount(0, 2 ** 31 - 1))
    .option(
      "--seeds <n>",
      "machines, each with the next seed (default: 100; 1 when --seed is given)",
      parseCount(1, 10_000_000),
    )
    .option(
      "--steps <n>",
      "steps of each machine before it comes to rest",
      parseCount(0, 1_000_000_000),
      10_000,
    )
    .option("--json <file>", "write the result as JSON, to a file or to - (standard output)")
    .addHelpText("after", EXAMPLES)
    .action(async (options: SimOptions) => {
      const result = await campaign(options);
      if (options.json !== "-") process.stdout.write(`${summary(result)}\n`);
      writeJson(options.json, result);
      if (result.failure) throw new UserError(complaint(result, result.failure), 1);
    });

async function campaign({ steps, ...given }: SimOptions): Promise<SimResult> {
  const { seed = Date.now() % 2 ** 31, seeds = given.seed === undefined ? 100 : 1 } = given;
  const progress = new Progress();
  const began = process.hrtime.bigint();
  const statistics: Record<string, number> = {};
  let failure: Failure | undefined;
  let played = 0;
  try {
    while (played < seeds && !failure) {
      const outcome = simulate(seed + played, steps);
      for (const [name, n] of Object.entries(outcome.statistics))
        statistics[name] = (statistics[name] ?? 0) + n;
      if (outcome.error) {
        progress.step(`seed ${seed + played} fails: looking for the shortest prefix that does`);
        failure = shorten(seed + played, steps, outcome.error);
      }
      played++;
      if (seeds > 1 && played % 100 === 0) progress.step(`${number(played)} of ${number(seeds)} machines`);
      await setImmediate(); // let a signal in
    }
  } finally {
    progress.stop();
  }
  const seconds = Number(process.hrtime.bigint() - began) / 1e9;
  return {
    schema: "coiommu.sim/1",
    commit: commit(),
    seed,
    seeds: played,
    stepsPerSeed: steps,
    stepsPerSecond: Math.round((statistics.steps ?? 0) / seconds),
    statistics: statistics as unknown as WorldStatistics,
    failure: failure ? { seed: failure.seed, steps: failure.steps, message: failure.message } : null,
  };
}

/** What a person needs to see the same again. */
function complaint(
  { commit: at }: SimResult,
  { seed, steps, message }: NonNullable<SimResult["failure"]>,
): string {
  return (
    `seed ${seed} fails within ${steps} steps${at === null ? "" : `, at commit ${at}`}: ${message}; ` +
    `play it again with \`coiommu sim --seed ${seed} --steps ${steps}\``
  );
}

const LABELS: Readonly<Record<keyof WorldStatistics, string>> = {
  steps: "steps",
  maps: "DMA mappings",
  mapsFailed: "mappings that failed",
  pinRequests: "pin requests",
  framesPinned: "frames pinned",
  framesUnpinned: "frames unpinned",
  transfers: "DMA transfers",
  kicksLost: "kicks lost",
  driverRestarts: "restarts of the driver",
  backendDeaths: "deaths of the backend",
  machineResets: "resets of the machine",
  operatorOrders: "orders of the operator",
  harvests: "harvests of dirty frames",
  moves: "moves of a device between the table and a domain",
  mapRequests: "MAP requests",
  unmapRequests: "UNMAP requests",
  allPinned: "times that all was pinned for want of a driver",
  balloonReturns: "frames back from a balloon",
  framesFaulted: "frames pinned by faults",
  faultsReported: "DMA faults reported to the guest",
  faultsDropped: "DMA faults dropped and counted",
  framesNeverTransferred: "frames claimed and never transferred, at most",
  framesSpeculative: "frames pinned unasked",
  speculationSaved: "of them used",
  speculationWasted: "of them unpinned unused",
  framesBeyondNeed: "frames pinned with others of their mapping, at most",
  mappingsExhausted: "pins refused because no mapping was left",
};

function summary(result: SimResult): string {
  const rows = Object.entries(LABELS).map(([name, label]) => [
    label,
    number(result.statistics[name as keyof WorldStatistics]),
  ]);
  const from =
    result.seeds === 1 ? `seed ${result.seed}` : `seeds ${result.seed} to ${result.seed + result.seeds - 1}`;
  return plainTable(["", from], [...rows, ["steps per second", number(result.stepsPerSecond)]]);
}

/** Of this checkout; null for an installed package, whose version says the same. */
function commit(): string | null {
  try {
    return execFileSync("git", ["rev-parse", "--short", "HEAD"], {
      cwd: import.meta.dirname,
      encoding: "utf8",
      stdio: ["ignore", "pipe", "ignore"],
    }).trim();
  } catch {
    return null;
  }
}
