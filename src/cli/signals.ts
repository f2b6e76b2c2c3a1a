import { closeAll } from "../control/run.ts";

type OnSignal = (name: NodeJS.Signals, exitCode: number) => void;

/** Ctrl-C and friends end the VMs under way, in order, and at once when repeated; what their runs say is no news. */
let interrupted = false;
let onSignal: OnSignal = (name, exitCode) => {
  if (interrupted) process.exit(exitCode);
  interrupted = true;
  process.stderr.write(`\ncoiommu: ${name}: ending the guest\n`);
  void closeAll().then(() => process.exit(exitCode));
};

export const isInterrupted = (): boolean => interrupted;

/** For a command that ends in a way of its own. */
export const takeSignals = (handler: OnSignal): void => {
  onSignal = handler;
};

export function installSignals(): void {
  for (const [name, exitCode] of [
    ["SIGINT", 130],
    ["SIGTERM", 143],
    ["SIGHUP", 129],
  ] as const)
    process.on(name, () => onSignal(name, exitCode));
}
