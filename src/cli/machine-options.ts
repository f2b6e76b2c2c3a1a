import { type Command, Option } from "commander";
import { UserError } from "../base/errors.ts";
import type { Bdf, Nanoseconds } from "../base/units.ts";
import type { PinnerName } from "../control/pinners.ts";
import { choosePolicy } from "../control/policy-choice.ts";
import type { Recording } from "../control/recording.ts";
import type { RunOptions } from "../control/run.ts";
import { isRemapping, type Strategy } from "../control/strategy.ts";
import { parseWorkload, type Workload } from "../control/workload.ts";
import { FIO_USAGE, GPU_USAGE, NIC_USAGE } from "../machine/workload-text.ts";
import { ADAPTIVE_BOUNDS, type IntervalChoice } from "../policy/pass-interval.ts";
import { createSpeculation } from "../policy/speculation/registry.ts";
import { BEFORE_ACTIVATION, type BeforeActivation } from "../tracking/life.ts";
import { FRONT_ENDS, type FrontEndName } from "../virtio/front-end.ts";
import { addDeviceOptions, checkDevice } from "./device-options.ts";
import type { Progress } from "./progress.ts";
import {
  parseCount,
  parseInterval,
  parseIntervalOrAdaptive,
  parseMemoryMiB,
  parseOneOf,
  parseQuota,
  parseSocketPath,
  parseTimeout,
  type Quota,
  quotaFrames,
} from "./units.ts";

const PINNERS = ["auto", "vfio", "iommufd", "io_uring", "software"] as const;
const MACHINES = ["auto", "qemu", "embedded"] as const;
const ACCELS = ["auto", "tcg", "kvm"] as const;
const usage = (text: string): string => text.replace("--workload ", "");

const WORKLOADS = `
Workloads, with what they are by default:
  idle:seconds=5                                nothing but the drivers
  ${usage(FIO_USAGE)}
                                                a disk, in a VM as fio does it
  ${usage(NIC_USAGE)}
                                                a network card (embedded)
  ${usage(GPU_USAGE)}
                                                a copy engine with large buffers (embedded)
  script:FILE                                   what the script does (VM)
  shell                                         what you do (VM)`;

export const API_OPTION = [
  "--api <path>",
  "while it runs, serve HTTP on a Unix socket: see and change what the guest may have pinned (/openapi.json)",
  parseSocketPath,
] as const;

/** Options of addPinOptions(), as commander gives them. */
export interface PinOptions {
  readonly policy: string;
  readonly interval: Nanoseconds | "adaptive";
  readonly intervalMin?: Nanoseconds;
  readonly intervalMax?: Nanoseconds;
  readonly speculate: string;
  readonly quota?: Quota;
  readonly pinner: (typeof PINNERS)[number];
  readonly activationTimeout: number;
}

/** Options that `run` and `compare` share. */
export interface MachineOptions extends PinOptions {
  readonly machine: (typeof MACHINES)[number];
  readonly memory: number;
  readonly cpus: number;
  readonly accel: (typeof ACCELS)[number];
  readonly frontEnd: FrontEndName;
  /** Undefined for the default of the machine. */
  readonly beforeActivation?: BeforeActivation;
  /** Undefined for the default of the machine. */
  readonly workload?: Workload;
  readonly disk?: string;
  readonly diskSize: number;
  readonly device?: Bdf;
  readonly overwriteDevice: boolean;
  readonly faultCapable: boolean;
  readonly json?: string;
  readonly api?: string;
  readonly recording?: Recording;
}

export type AddOption = (
  flags: string,
  text: string,
  parse: (value: string, previous: unknown) => unknown,
  value?: unknown,
  shown?: string,
) => unknown;

export const optionOf =
  (command: Command): AddOption =>
  (flags, text, parse, value, shown) => {
    const option = new Option(flags, text).argParser(parse);
    command.addOption(value === undefined ? option : option.default(value, shown));
  };

/** What intervalOf() reads. */
export function addIntervalOptions(option: AddOption): void {
  option(
    "--interval <time>",
    "time between unpin passes: 1s, 500ms, or adaptive: shorter while they find much, longer when frames come back soon",
    parseIntervalOrAdaptive,
    "adaptive",
    "adaptive",
  );
  option("--interval-min <time>", "least that an adaptive interval gets to (default: 100ms)", parseInterval);
  option("--interval-max <time>", "most that it gets to (default: 10s)", parseInterval);
}

/** Options of how a VM's pins are managed: of `run`, `compare` and `attach`. */
export function addPinOptions(option: AddOption): void {
  option(
    "--policy <name>",
    "which frames to unpin, NAME[,key=value…]: see `coiommu policies`; or ./FILE.ts, a policy of yours",
    checkedPolicy,
    "lru",
  );
  addIntervalOptions(option);
  option(
    "--speculate <name>",
    "what to pin beside what the guest asks for, before it does, NAME[,key=value…]: see `coiommu policies`",
    (text) => createSpeculation(text) && text,
    "off",
  );
  option(
    "--quota <limit>",
    "most the guest may have pinned: 10% of its memory, or a number of frames",
    parseQuota,
  );
  option(
    "--pinner <name>",
    "what pins: io_uring, software (no real pins), vfio or iommufd (for --device), auto (io_uring for a VM, software for " +
      "embedded, for --device iommufd if it is there, else vfio)",
    parseOneOf(PINNERS),
    "auto",
  );
  option(
    "--activation-timeout <time>",
    "pin all of its memory when the guest's driver takes longer than this and an assigned device is in use: 60s, off",
    parseTimeout,
    parseTimeout("60s"),
    "60s",
  );
}

export function addMachineOptions(command: Command): Command {
  const option = optionOf(command);
  option(
    "--machine <name>",
    "qemu (a VM), embedded (guest CPUs are threads of this process; needs Node alone), or auto: a VM if it can be had",
    parseOneOf(MACHINES),
    "auto",
  );
  option("--memory <size>", "guest memory: 512M, 2G", parseMemoryMiB, 1024, "1G");
  option("--cpus <n>", "guest CPUs", parseCount(1, 64), 1);
  option("--accel <name>", "how QEMU runs the guest: auto, tcg, kvm", parseOneOf(ACCELS), "auto");
  option(
    "--front-end <name>",
    "how the guest's driver finds coIOMMU: virtio-iommu, or crosvm (the PCI function of crosvm's; tracking only)",
    parseOneOf(FRONT_ENDS),
    "virtio-iommu",
  );
  addPinOptions(option);
  option(
    "--before-activation <what>",
    "what is pinned before the guest's driver is loaded: bios (low memory, and what firmware makes our devices touch), " +
      "all, none (default: bios; embedded: none)",
    parseOneOf(BEFORE_ACTIVATION),
  );
  option(
    "--workload <what>",
    "see below (default: fio:rw=randread,bs=4k,iodepth=32,seconds=5; embedded: 4 seconds of it)",
    parseWorkload,
  );
  option(
    "--disk <file>",
    "raw image behind the assigned disk; it is written to, embedded also by a fio that reads (default: memory)",
    (file) => file,
  );
  option("--disk-size <size>", "size of the assigned disk in memory", parseMemoryMiB, 256, "256M");
  addDeviceOptions(command, option);
  command.option(
    "--fault-capable",
    "assigned devices may fault on their buffers, which are pinned then and not when mapped (coiommu)",
    false,
  );
  option(...API_OPTION);
  option("--json <file>", "write the result as JSON, to a file or to - (standard output)", (file) => file);
  return command.addHelpText("after", WORKLOADS);
}

/** Before anything is set up. Throws UserError for options that do not go together. */
export function checkOptions(options: MachineOptions, strategies: readonly Strategy[]): void {
  intervalOf(options);
  const { frontEnd, speculate } = options;
  const remapping = strategies.find(isRemapping);
  if (frontEnd === "crosvm" && remapping !== undefined)
    throw new UserError(`--front-end crosvm: has no domains, which strategy ${remapping} needs`);
  if (speculate !== "off" && !strategies.includes("coiommu"))
    throw new UserError(`--speculate ${speculate}: only strategy coiommu pins what is asked for`);
  checkDevice(options, strategies);
}

const checkedPolicy = (text: string): string => choosePolicy(text) && text;

/** Throws UserError for bounds that are none. */
export function intervalOf({
  interval,
  intervalMin,
  intervalMax,
}: Pick<PinOptions, "interval" | "intervalMin" | "intervalMax">): IntervalChoice {
  if (interval !== "adaptive") {
    if (intervalMin ?? intervalMax)
      throw new UserError("--interval-min and --interval-max are bounds of --interval adaptive");
    return interval;
  }
  const [min, max] = [intervalMin ?? ADAPTIVE_BOUNDS.min, intervalMax ?? ADAPTIVE_BOUNDS.max];
  if (min > max) throw new UserError(`--interval-min ${min / 1e6}ms is above --interval-max ${max / 1e6}ms`);
  return { min, max };
}

/** What `run` and `compare` ask for, for one run; what pins depends on the machine. */
export const runOptions = (
  options: MachineOptions,
  workload: Workload,
  strategy: Strategy,
  pinner: PinnerName,
  beforeActivation: BeforeActivation,
  progress: Progress,
  api: RunOptions["api"],
): RunOptions => ({
  workload,
  strategy,
  frontEnd: options.frontEnd,
  pinner,
  memoryMiB: options.memory,
  cpus: options.cpus,
  policy: options.policy,
  interval: intervalOf(options),
  speculate: options.speculate,
  quota: quotaFrames(options.quota, options.memory),
  disk: { sizeMiB: options.diskSize, ...(options.disk !== undefined && { file: options.disk }) },
  ...(options.device !== undefined && {
    device: { bdf: options.device, overwrite: options.overwriteDevice },
  }),
  faultCapable: options.faultCapable,
  beforeActivation: options.beforeActivation ?? beforeActivation,
  activationTimeout: options.activationTimeout,
  onWarning: progress.warn,
  onProgress: progress.step,
  ...(api && { api }),
  ...(options.recording && { recording: options.recording }),
});
