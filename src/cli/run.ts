import { Command } from "commander";
import { UserError } from "../base/errors.ts";
import { Recording } from "../control/recording.ts";
import { STRATEGIES, type Strategy } from "../control/strategy.ts";
import { monotonicClock } from "../host/clock.ts";
import { withApi } from "./api.ts";
import { prepareMachine } from "./machine-choice.ts";
import { addMachineOptions, checkOptions, type MachineOptions } from "./machine-options.ts";
import { table, writeJson } from "./output.ts";
import { Progress } from "./progress.ts";
import { parseOneOf } from "./units.ts";

interface RunCommandOptions extends MachineOptions {
  readonly strategy: Strategy;
  readonly record?: string;
}

export const runCommand = (): Command =>
  addMachineOptions(
    new Command("run")
      .description("One guest, one strategy, one workload; a summary at the end.")
      .option(
        "--strategy <name>",
        `what is pinned, and when: ${STRATEGIES.join(", ")}`,
        parseOneOf(STRATEGIES),
        "coiommu",
      )
      .option(
        "--record <file>",
        "write down what is mapped, unmapped and pinned, and when: for `coiommu replay`",
      ),
  ).action(async (options: RunCommandOptions) => {
    checkOptions(options, [options.strategy]);
    const progress = new Progress();
    const recording = recordingOf(options, progress);
    try {
      const { result, complaints } = await withApi(options.api, progress.warn, async (api) => {
        const runUnder = await prepareMachine({ ...options, ...(recording && { recording }) }, progress, api);
        return await runUnder(options.strategy);
      });
      progress.stop();
      if (options.json !== "-") process.stdout.write(`${table([result])}\n`);
      writeJson(options.json, result);
      if (complaints.length > 0) throw new UserError(complaints.join("; "), 1);
    } finally {
      recording?.close();
      progress.stop();
    }
  });

function recordingOf({ record, strategy }: RunCommandOptions, progress: Progress): Recording | undefined {
  if (record === undefined) return undefined;
  if (strategy !== "coiommu")
    throw new UserError(
      `--record: strategy ${strategy} has no driver that says what it maps; record coiommu`,
    );
  return new Recording(record, monotonicClock.now(), progress.warn);
}
