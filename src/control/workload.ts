import { UserError } from "../base/errors.ts";
import type { GuestAgent } from "../machine/qemu/agent.ts";
import { FIO_USAGE, type FioWorkload, parseFioWorkload, runFio } from "../machine/qemu/fio.ts";
import { SHELL_SCRIPT } from "../machine/qemu/qemu.ts";
import type { WorkloadResult } from "./result.ts";

export type Workload =
  | { readonly name: "idle"; readonly text: string; readonly seconds: number }
  | { readonly name: "shell"; readonly text: string }
  | { readonly name: "fio"; readonly text: string; readonly fio: FioWorkload };

const SHELL_MS_MAX = 2 ** 31 - 1;

/** From `--workload`. Throws UserError. */
export function parseWorkload(text: string): Workload {
  if (text === "shell") return { name: "shell", text };
  if (text === "fio" || text.startsWith("fio:")) return { name: "fio", text, fio: parseFioWorkload(text) };
  const idle = /^idle(?::seconds=(\d{1,4}))?$/.exec(text);
  if (!idle)
    throw new UserError(`--workload ${text}: give idle, idle:seconds=N, shell, or ${FIO_USAGE.slice(11)}`);
  return { name: "idle", text, seconds: Number(idle[1] ?? 5) };
}

export async function runWorkload(agent: GuestAgent, workload: Workload): Promise<WorkloadResult> {
  const nothing = { ops: null, iops: null, bytesPerSecond: null, latencyUs: null, verified: null, errors: 0 };
  switch (workload.name) {
    case "idle":
      await agent.run(`sleep ${workload.seconds}`, {
        timeoutMs: (workload.seconds + 60) * 1000,
        what: "idling",
      });
      return { name: "idle", options: { seconds: workload.seconds }, ...nothing };
    case "shell":
      await agent.run(SHELL_SCRIPT, { timeoutMs: SHELL_MS_MAX, what: "the shell" });
      return { name: "shell", options: {}, ...nothing };
    case "fio": {
      const { rw, blockSize, ioDepth, seconds, size } = workload.fio;
      const options = { rw, bs: blockSize, iodepth: ioDepth, seconds, ...(size !== undefined && { size }) };
      return { name: "fio", options, ...(await runFio(agent, workload.fio)) };
    }
  }
}
