import { UserError } from "../base/errors.ts";
import type { PinnerName, Strategy } from "../control/host-side.ts";
import { type Outcome, run } from "../control/run.ts";
import { Vm } from "../control/vm.ts";
import { IoUringPinner } from "../host/io-uring-pinner.ts";
import { ensureGuest, type Guest } from "../machine/qemu/guest.ts";
import { type MachineOptions, runOptions } from "./machine-options.ts";
import type { Progress } from "./progress.ts";

/** Runs the workload of the options under a strategy, on the machine that they name or that was chosen. */
export type Runner = (strategy: Strategy) => Promise<Outcome>;

/** Set up what the machine needs. */
export async function prepareMachine(options: MachineOptions, progress: Progress): Promise<Runner> {
  const { workload } = options;
  if (workload.name === "nic" || workload.name === "gpu")
    throw new UserError(`--workload ${workload.text}: a VM has no device for it`);
  return inVm(options, await ensureGuest(progress.step), progress);
}

function inVm(options: MachineOptions, guest: Guest, progress: Progress): Runner {
  const pinner = vmPinner(options.pinner, progress.warn);
  const shell = options.workload.name === "shell";
  return (strategy) => {
    const settings = runOptions(options, strategy, pinner, progress.warn);
    const start = () => Vm.start({ ...settings, guest, accel: options.accel, shell });
    progress.step("starting QEMU");
    return run(settings, start, shell ? () => progress.stop() : progress.step);
  };
}

function vmPinner(name: MachineOptions["pinner"], warn: (text: string) => void): PinnerName {
  if (name === "software") return name;
  const reason = IoUringPinner.unavailable();
  if (reason === undefined) return "io_uring";
  if (name === "io_uring") throw new UserError(`--pinner io_uring: ${reason}`, 1);
  warn(`--pinner auto takes "software", which pins nothing in the kernel: ${reason}`);
  return "software";
}
