import { readFileSync } from "node:fs";
import { InvariantViolation, UserError } from "../base/errors.ts";
import type { GuestAgent } from "../machine/qemu/agent.ts";
import { runFio } from "../machine/qemu/fio.ts";
import { SHELL_SCRIPT } from "../machine/qemu/qemu.ts";
import {
  FIO_USAGE,
  type FioWorkload,
  GPU_USAGE,
  type GpuWorkload,
  NIC_USAGE,
  type NicWorkload,
  parseFioWorkload,
  parseGpuWorkload,
  parseNicWorkload,
} from "../machine/workload-text.ts";
import type { WorkloadResult } from "./result.ts";

export type Workload =
  | { readonly name: "idle"; readonly text: string; readonly seconds: number }
  | { readonly name: "shell"; readonly text: string }
  | { readonly name: "script"; readonly text: string; readonly script: string }
  | { readonly name: "fio"; readonly text: string; readonly fio: FioWorkload }
  | { readonly name: "nic"; readonly text: string; readonly nic: NicWorkload }
  | { readonly name: "gpu"; readonly text: string; readonly gpu: GpuWorkload };

const SHELL_MS_MAX = 2 ** 31 - 1;
const SCRIPT_MS_MAX = 3_600_000;

/** From `--workload`. Throws UserError. */
export function parseWorkload(text: string): Workload {
  switch (/^\w*/.exec(text)![0]) {
    case "fio":
      return { name: "fio", text, fio: parseFioWorkload(text) };
    case "nic":
      return { name: "nic", text, nic: parseNicWorkload(text) };
    case "gpu":
      return { name: "gpu", text, gpu: parseGpuWorkload(text) };
  }
  if (text === "shell") return { name: "shell", text };
  if (text.startsWith("script:")) return { name: "script", text, script: readScript(text.slice(7)) };
  const idle = /^idle(?::seconds=(\d{1,4}))?$/.exec(text);
  if (idle) return { name: "idle", text, seconds: Number(idle[1] ?? 5) };
  const usages = [FIO_USAGE, NIC_USAGE, GPU_USAGE].map((usage) => usage.replace("--workload ", ""));
  throw new UserError(
    `--workload ${text}: give idle, idle:seconds=N, script:FILE, shell, or ${usages.join(", or ")}`,
  );
}

/** As in the result: what the workload is called, and its options with what was left out. */
export function describeWorkload(workload: Workload): Pick<WorkloadResult, "name" | "options"> {
  const { name } = workload;
  switch (name) {
    case "idle":
      return { name, options: { seconds: workload.seconds } };
    case "fio": {
      const { rw, blockSize, ioDepth, seconds, size } = workload.fio;
      const options = { rw, bs: blockSize, iodepth: ioDepth, seconds, ...(size !== undefined && { size }) };
      return { name, options };
    }
    case "nic":
      return { name, options: { ...workload.nic } };
    case "gpu": {
      const { buffers, size, holdMs, ioDepth, seconds } = workload.gpu;
      return { name, options: { buffers, size, hold: holdMs, iodepth: ioDepth, seconds } };
    }
    default:
      return { name, options: {} };
  }
}

function readScript(file: string): string {
  try {
    return readFileSync(file, "utf8");
  } catch (error) {
    throw new UserError(`--workload script:${file}: the script cannot be read: ${(error as Error).message}`);
  }
}

/** What a workload without figures of its own says. */
export const NO_FIGURES = {
  ...{ ops: null, iops: null, bytesPerSecond: null, latencyUs: null, verified: null, errors: 0 },
};

/** Run it in a VM. */
export async function runWorkload(agent: GuestAgent, workload: Workload): Promise<WorkloadResult> {
  const described = describeWorkload(workload);
  switch (workload.name) {
    case "idle": {
      const timeoutMs = (workload.seconds + 60) * 1000;
      await agent.run(`sleep ${workload.seconds}`, { timeoutMs, what: "idling" });
      return { ...described, ...NO_FIGURES };
    }
    case "shell":
      await agent.run(SHELL_SCRIPT, { timeoutMs: SHELL_MS_MAX, what: "the shell" });
      return { ...described, ...NO_FIGURES };
    case "script": {
      const { code } = await agent.run(workload.script, { timeoutMs: SCRIPT_MS_MAX, what: "the script" });
      return { ...described, ...NO_FIGURES, errors: code === 0 ? 0 : 1 };
    }
    case "fio":
      return { ...described, ...(await runFio(agent, workload.fio)) };
    default:
      throw new InvariantViolation(`a VM has no device for the workload ${workload.name}`);
  }
}
