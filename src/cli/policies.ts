import { Command } from "commander";
import { policies } from "../policy/registry.ts";

export const policiesCommand = (): Command =>
  new Command("policies").description("The unpin policies that --policy takes.").action(() => {
    for (const { name, summary } of policies) process.stdout.write(`${name.padEnd(8)}${summary}\n`);
  });
