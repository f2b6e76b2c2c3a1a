import { CoiommuError, UserError } from "../base/errors.ts";
import { formatBdf } from "../base/units.ts";
import { EmbeddedMachine } from "../control/embedded.ts";
import type { PinnerName } from "../control/pinners.ts";
import { type Outcome, type RunOptions, run } from "../control/run.ts";
import type { Strategy } from "../control/strategy.ts";
import { Vm } from "../control/vm.ts";
import { parseWorkload } from "../control/workload.ts";
import { IoUringPinner } from "../host/io-uring-pinner.ts";
import { pinnerFor } from "../host/iommufd-device.ts";
import { nativeUnavailable } from "../host/libc.ts";
import { vmUnavailable } from "../machine/qemu/doctor.ts";
import { ensureGuest, type Guest } from "../machine/qemu/guest.ts";
import { checkPinner } from "./device-options.ts";
import { type MachineOptions, runOptions } from "./machine-options.ts";
import type { Progress } from "./progress.ts";

/** Runs the workload of the options under a strategy, on the machine that they name or that was chosen. */
export type Runner = (strategy: Strategy) => Promise<Outcome>;

const VM_WORKLOAD = "fio:rw=randread,bs=4k,iodepth=32,seconds=5";
/** Shorter, because the disk is filled and checked too: a comparison of three strategies takes less than a minute. */
const EMBEDDED_WORKLOAD = "fio:rw=randread,bs=4k,iodepth=32,seconds=4";

/** Set up what the machine needs. With `--machine auto`, says which one it is, and why. */
export async function prepareMachine(
  options: MachineOptions,
  progress: Progress,
  api: RunOptions["api"],
): Promise<Runner> {
  const vmNeed = needsVm(options);
  if (options.machine === "embedded") {
    if (vmNeed) throw new UserError(`${vmNeed}: needs a VM, not --machine embedded`);
    return embedded(options, progress, api);
  }
  if (options.machine === "qemu") {
    const embeddedNeed =
      needsEmbedded(options) ?? (options.device && `--device ${formatBdf(options.device)}`);
    if (embeddedNeed) throw new UserError(`${embeddedNeed}: needs --machine embedded`);
    return inVm(options, await ensureGuest(progress.step), progress, api);
  }
  if (vmNeed) {
    progress.note(`machine: a VM in QEMU, because ${vmNeed} needs one`);
    return inVm(options, await ensureGuest(progress.step), progress, api);
  }
  const guest = await guestOrReason(options, progress);
  if (typeof guest === "string") {
    progress.note(`machine: embedded (no VM), because ${guest}`);
    return embedded(options, progress, api);
  }
  progress.note("machine: a VM in QEMU, because what it needs is here (--machine embedded does without)");
  return inVm(options, guest, progress, api);
}

/** What VMs are made from, or why there is none, as a clause. */
async function guestOrReason(options: MachineOptions, progress: Progress): Promise<Guest | string> {
  const embeddedNeed = needsEmbedded(options);
  if (embeddedNeed) return `only there is a device for ${embeddedNeed}`;
  if (options.device !== undefined) return "only there a guest uses a --device";
  const reason = nativeUnavailable() ?? vmUnavailable();
  if (reason !== undefined) return reason;
  try {
    return await ensureGuest(progress.step);
  } catch (error) {
    if (!(error instanceof CoiommuError)) throw error;
    return `no VM can be set up: ${error.message}`;
  }
}

/** What of the options only the embedded machine has. */
const needsEmbedded = ({ workload }: MachineOptions): string | undefined =>
  workload?.name === "nic" || workload?.name === "gpu" ? `--workload ${workload.text}` : undefined;

/** What of the options only a VM has. */
function needsVm({ workload, accel }: MachineOptions): string | undefined {
  if (workload?.name === "script" || workload?.name === "shell") return `--workload ${workload.text}`;
  return accel === "auto" ? undefined : `--accel ${accel}`;
}

function inVm(options: MachineOptions, guest: Guest, progress: Progress, api: RunOptions["api"]): Runner {
  const pinner = vmPinner(options.pinner, progress.warn);
  const workload = options.workload ?? parseWorkload(VM_WORKLOAD);
  const shell = workload.name === "shell";
  return (strategy) => {
    const settings = runOptions(options, workload, strategy, pinner, "bios", progress, api);
    const start = () =>
      Vm.start({ ...settings, guest, accel: options.accel, shell, hotplug: api !== undefined });
    progress.step("starting QEMU");
    return run(settings, start, shell ? () => progress.stop() : progress.step);
  };
}

export function vmPinner(name: MachineOptions["pinner"], warn: (text: string) => void): PinnerName {
  checkPinner(name, undefined);
  if (name !== "auto") return checkedPinner(name);
  const reason = IoUringPinner.unavailable();
  if (reason === undefined) return "io_uring";
  warn(`--pinner auto takes "software", which pins nothing in the kernel: ${reason}`);
  return "software";
}

function checkedPinner(name: PinnerName): PinnerName {
  const reason = name === "io_uring" ? IoUringPinner.unavailable() : undefined;
  if (reason !== undefined) throw new UserError(`--pinner ${name}: ${reason}`, 1);
  return name;
}

function embeddedPinner({ pinner, device }: MachineOptions): PinnerName {
  if (pinner !== "auto") return checkedPinner(pinner);
  return device === undefined ? "software" : pinnerFor(formatBdf(device));
}

function embedded(options: MachineOptions, progress: Progress, api: RunOptions["api"]): Runner {
  const pinner = embeddedPinner(options);
  const workload = options.workload ?? parseWorkload(EMBEDDED_WORKLOAD);
  return (strategy) => {
    // There is no firmware, and its devices run when its driver does.
    const settings = runOptions(options, workload, strategy, pinner, "none", progress, api);
    progress.step("starting the guest");
    return run(settings, () => EmbeddedMachine.start(settings), progress.step);
  };
}
