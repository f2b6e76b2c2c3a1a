import { CommanderError } from "commander";
import { CoiommuError, UserError } from "../base/errors.ts";
import { closeAll } from "../control/run.ts";
import { program } from "./program.ts";

/** Who reads us may stop, as `head` does. */
process.stdout.on("error", (error: NodeJS.ErrnoException) => {
  if (error.code !== "EPIPE") throw error;
});

/** Ctrl-C and friends end the VMs under way, in order; what their runs say of it is no news. */
let interrupted = false;
for (const [signal, code] of [
  ["SIGINT", 130],
  ["SIGTERM", 143],
  ["SIGHUP", 129],
] as const)
  process.once(signal, () => {
    interrupted = true;
    process.stderr.write(`\ncoiommu: ${signal}: ending the guest\n`);
    void closeAll().then(() => process.exit(code));
  });

try {
  await program().parseAsync();
} catch (error) {
  if (!interrupted) process.exitCode = report(error);
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
