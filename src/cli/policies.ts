import { Command } from "commander";
import { shown } from "../policy/parameters.ts";
import type { PolicyEntry } from "../policy/policy.ts";
import { policies } from "../policy/registry.ts";
import { speculations } from "../policy/speculation/registry.ts";

const WIDTH = 14;
const OPTIMAL = `optimal       what none of these can beat, with knowledge of the future: \`coiommu replay\` compares with it
              (Belady, A study of replacement algorithms for a virtual-storage computer, 1966)
`;

export const policiesCommand = (): Command =>
  new Command("policies")
    .description("What --policy and --speculate take, with their parameters and defaults.")
    .action(() => {
      process.stdout.write("Unpin policies, --policy:\n");
      list(policies);
      process.stdout.write(OPTIMAL);
      process.stdout.write("\nSpeculations, --speculate:\n");
      list(speculations);
    });

function list(entries: readonly Pick<PolicyEntry, "name" | "summary" | "source" | "parameters">[]): void {
  for (const { name, summary, source, parameters } of entries) {
    process.stdout.write(`${name.padEnd(WIDTH)}${summary}\n${"".padEnd(WIDTH)}(${source})\n`);
    for (const [key, parameter] of Object.entries(parameters)) {
      const value = `${key}=${shown(parameter, parameter.default)}`;
      process.stdout.write(`  ${value.padEnd(WIDTH - 4)}  ${parameter.summary}\n`);
    }
  }
}
