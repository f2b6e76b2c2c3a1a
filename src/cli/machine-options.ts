import { type Command, Option } from "commander";
import type { Nanoseconds } from "../base/units.ts";
import type { PinnerName, Strategy } from "../control/host-side.ts";
import type { RunOptions } from "../control/run.ts";
import { parseWorkload, type Workload } from "../control/workload.ts";
import { createPolicy } from "../policy/registry.ts";
import {
  parseCount,
  parseInterval,
  parseMemoryMiB,
  parseOneOf,
  parseQuota,
  type Quota,
  quotaFrames,
} from "./units.ts";

export const STRATEGIES = ["none", "static", "coiommu"] as const satisfies readonly Strategy[];
const PINNERS = ["auto", "io_uring", "software"] as const;
const ACCELS = ["auto", "tcg", "kvm"] as const;

/** Options that `run` and `compare` share, as commander gives them. */
export interface MachineOptions {
  readonly memory: number;
  readonly cpus: number;
  readonly accel: (typeof ACCELS)[number];
  readonly policy: string;
  readonly interval: Nanoseconds;
  readonly quota?: Quota;
  readonly pinner: (typeof PINNERS)[number];
  readonly workload: Workload;
  readonly disk?: string;
  readonly diskSize: number;
  readonly json?: string;
}

export function addMachineOptions(command: Command): Command {
  const option = (
    flags: string,
    text: string,
    parse: (value: string) => unknown,
    value?: unknown,
    shown?: string,
  ) =>
    command.addOption(
      value === undefined
        ? new Option(flags, text).argParser(parse)
        : new Option(flags, text).argParser(parse).default(value, shown),
    );
  option("--memory <size>", "guest memory: 512M, 2G", parseMemoryMiB, 1024, "1G");
  option("--cpus <n>", "guest CPUs", parseCount(1, 64), 1);
  option("--accel <name>", "how QEMU runs the guest: auto, tcg, kvm", parseOneOf(ACCELS), "auto");
  option("--policy <name>", "when to unpin: see `coiommu policies`", checkedPolicy, "lru");
  option(
    "--interval <time>",
    "time between unpin passes: 1s, 500ms",
    parseInterval,
    parseInterval("1s"),
    "1s",
  );
  option(
    "--quota <limit>",
    "most the guest may have pinned: 10% of its memory, or a number of frames",
    parseQuota,
  );
  option(
    "--pinner <name>",
    "what pins: auto, io_uring, software (no real pins)",
    parseOneOf(PINNERS),
    "auto",
  );
  option(
    "--workload <what>",
    "idle[:seconds=N], script:FILE, shell, or fio:rw=randread,bs=4k,iodepth=32,seconds=5",
    parseWorkload,
    parseWorkload("fio:rw=randread,bs=4k,iodepth=32,seconds=5"),
    "fio:rw=randread,bs=4k,iodepth=32,seconds=5",
  );
  option(
    "--disk <file>",
    "raw image behind the assigned disk; it is written to (default: memory)",
    (file) => file,
  );
  option("--disk-size <size>", "size of the assigned disk in memory", parseMemoryMiB, 256, "256M");
  option("--json <file>", "write the result as JSON, to a file or to - (standard output)", (file) => file);
  return command;
}

const checkedPolicy = (text: string): string => createPolicy(text) && text;

/** What `run` and `compare` ask for, for one run; what pins depends on the machine. */
export const runOptions = (
  options: MachineOptions,
  strategy: Strategy,
  pinner: PinnerName,
  warn: (text: string) => void,
): RunOptions => ({
  strategy,
  pinner,
  memoryMiB: options.memory,
  cpus: options.cpus,
  policy: options.policy,
  interval: options.interval,
  quota: quotaFrames(options.quota, options.memory),
  workload: options.workload,
  disk: { sizeMiB: options.diskSize, ...(options.disk !== undefined && { file: options.disk }) },
  onWarning: warn,
});
