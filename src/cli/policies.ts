import { Command } from "commander";
import { shown } from "../policy/parameters.ts";
import { policies } from "../policy/registry.ts";

const WIDTH = 14;

export const policiesCommand = (): Command =>
  new Command("policies")
    .description("The unpin policies that --policy takes, with their parameters and defaults.")
    .action(() => {
      for (const { name, summary, source, parameters } of policies) {
        process.stdout.write(`${name.padEnd(WIDTH)}${summary}\n${"".padEnd(WIDTH)}(${source})\n`);
        for (const [key, parameter] of Object.entries(parameters)) {
          const value = `${key}=${shown(parameter, parameter.default)}`;
          process.stdout.write(`  ${value.padEnd(WIDTH - 4)}  ${parameter.summary}\n`);
        }
      }
    });
