import { existsSync } from "node:fs";
import { Command } from "commander";
import { UserError } from "../base/errors.ts";

const MAIN = new URL("../../bench/main.ts", import.meta.url);

/** The experiments are of the repository, with what they need: a compiler, plots. */
export const benchCommand = (): Command =>
  new Command("bench")
    .description(
      "Measure on this machine, in a checkout of coIOMMU; without a name, say which experiments there are.",
    )
    .argument("[name]", "which experiment")
    .argument("[more...]", "what it takes")
    .allowUnknownOption()
    .action(async () => {
      if (!existsSync(MAIN))
        throw new UserError("the experiments are not in the package: run this in a checkout of coIOMMU", 1);
      process.argv.splice(2, 1); // as `npm run bench --` has them
      await import(MAIN.href);
    });
