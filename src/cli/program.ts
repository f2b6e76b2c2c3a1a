import { Command } from "commander";
import { attachCommand } from "./attach.ts";
import { benchCommand } from "./bench.ts";
import { compareCommand } from "./compare.ts";
import { doctorCommand } from "./doctor.ts";
import { policiesCommand } from "./policies.ts";
import { replayCommand } from "./replay.ts";
import { runCommand } from "./run.ts";
import { simCommand } from "./sim.ts";

/** All commands. Wrong usage throws CommanderError, after saying on stderr what is wrong; or UserError. */
export function program(): Command {
  const root = new Command("coiommu")
    .description(
      "A virtual IOMMU that tracks a guest's DMA buffers cooperatively: pin only what devices use.",
    )
    .showHelpAfterError("(coiommu --help, or coiommu COMMAND --help, shows what is accepted)");
  for (const command of [
    doctorCommand(),
    runCommand(),
    compareCommand(),
    attachCommand(),
    policiesCommand(),
    replayCommand(),
    simCommand(),
    benchCommand(),
  ])
    root.addCommand(command.copyInheritedSettings(root));
  for (const command of [root, ...root.commands]) command.exitOverride();
  return root;
}
