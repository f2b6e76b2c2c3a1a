import { Command } from "commander";
import { UserError } from "../base/errors.ts";
import { STRATEGIES, type Strategy } from "../control/strategy.ts";
import { withApi } from "./api.ts";
import { prepareMachine } from "./machine-choice.ts";
import { addMachineOptions, checkStrategies, type MachineOptions } from "./machine-options.ts";
import { table, writeJson } from "./output.ts";
import { Progress } from "./progress.ts";
import { parseOneOf } from "./units.ts";

export const runCommand = (): Command =>
  addMachineOptions(
    new Command("run")
      .description("One guest, one strategy, one workload; a summary at the end.")
      .option(
        "--strategy <name>",
        `what is pinned, and when: ${STRATEGIES.join(", ")}`,
        parseOneOf(STRATEGIES),
        "coiommu",
      ),
  ).action(async (options: MachineOptions & { strategy: Strategy }) => {
    checkStrategies(options, [options.strategy]);
    const progress = new Progress();
    try {
      const { result, complaints } = await withApi(options.api, progress.warn, async (api) => {
        const runUnder = await prepareMachine(options, progress, api);
        return await runUnder(options.strategy);
      });
      progress.stop();
      if (options.json !== "-") process.stdout.write(`${table([result])}\n`);
      writeJson(options.json, result);
      if (complaints.length > 0) throw new UserError(complaints.join("; "), 1);
    } finally {
      progress.stop();
    }
  });
