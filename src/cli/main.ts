import { CommanderError } from "commander";
import { CoiommuError, UserError } from "../base/errors.ts";
import { program } from "./program.ts";
import { installSignals, isInterrupted } from "./signals.ts";

/** Who reads us may stop, as `head` does. */
process.stdout.on("error", (error: NodeJS.ErrnoException) => {
  if (error.code !== "EPIPE") throw error;
});

installSignals();

try {
  await program().parseAsync();
} catch (error) {
  if (!isInterrupted()) process.exitCode = report(error);
}

function report(error: unknown): number {
  // Commander has said it already; help and version are no errors.
  if (error instanceof CommanderError) return error.exitCode === 0 ? 0 : 2;
  if (error instanceof CoiommuError) {
    process.stderr.write(`coiommu: ${error.message}\n`);
    return error instanceof UserError ? error.exitCode : 1;
  }
  process.stderr.write(`coiommu: internal error, please report it: ${(error as Error)?.stack ?? error}\n`);
  return 1;
}
