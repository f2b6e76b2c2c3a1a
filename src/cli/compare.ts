import { Command } from "commander";
import { UserError } from "../base/errors.ts";
import type { CompareResult, RunResult } from "../control/result.ts";
import { STRATEGIES, type Strategy } from "../control/strategy.ts";
import { withApi } from "./api.ts";
import { prepareMachine } from "./machine-choice.ts";
import { addMachineOptions, checkOptions, type MachineOptions } from "./machine-options.ts";
import { table, writeJson } from "./output.ts";
import { Progress } from "./progress.ts";
import { parseCount, parseListOf } from "./units.ts";

interface CompareOptions extends MachineOptions {
  /** Undefined for the default. */
  readonly strategies?: readonly Strategy[];
  readonly rounds: number;
}

export const compareCommand = (): Command =>
  addMachineOptions(
    new Command("compare")
      .description("The same workload under several strategies, alternating, in one run.")
      .option(
        "--strategies <list>",
        `of ${STRATEGIES.join(", ")} (default: none,static,coiommu; with --device static,coiommu)`,
        parseListOf(STRATEGIES),
      )
      .option("--rounds <n>", "how often each strategy runs; the table shows medians", parseCount(1, 100), 3),
  ).action(async (options: CompareOptions) => {
    if (options.workload?.name === "shell")
      throw new UserError("--workload shell: a person cannot be compared; give it to `coiommu run`");
    const strategies = options.strategies ?? defaultStrategies(options);
    checkOptions(options, strategies);
    const progress = new Progress();
    try {
      const runs: RunResult[] = [];
      const complaints: string[] = [];
      const total = options.rounds * strategies.length;
      await withApi(options.api, progress.warn, async (api) => {
        const runUnder = await prepareMachine(options, progress, api);
        for (const strategy of alternating(strategies, options.rounds)) {
          progress.prefix(`[${runs.length + 1}/${total}] ${strategy}: `);
          const { result, complaints: met } = await runUnder(strategy);
          runs.push(result);
          complaints.push(...met.map((text) => `${strategy}: ${text}`));
        }
      });
      progress.stop();
      const result: CompareResult = { schema: "coiommu.compare/1", host: runs[0]!.host, runs };
      if (options.json !== "-") process.stdout.write(`${table(runs)}\n`);
      writeJson(options.json, result);
      if (complaints.length > 0) throw new UserError(complaints.join("; "), 1);
    } finally {
      progress.stop();
    }
  });

const defaultStrategies = ({ device }: CompareOptions): Strategy[] =>
  device === undefined ? ["none", "static", "coiommu"] : ["static", "coiommu"];

/** Round by round, each beginning with another strategy, so that none always comes first on a machine that warms up. */
function* alternating(strategies: readonly Strategy[], rounds: number): Generator<Strategy> {
  for (let round = 0; round < rounds; round++)
    for (let i = 0; i < strategies.length; i++) yield strategies[(round + i) % strategies.length]!;
}
