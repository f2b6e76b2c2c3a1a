import { readFileSync } from "node:fs";
import { UserError } from "../base/errors.ts";
import type { GuestAgent } from "../machine/qemu/agent.ts";
import { runFio } from "../machine/qemu/fio.ts";
import { SHELL_SCRIPT } from "../machine/qemu/qemu.ts";
import { FIO_USAGE, type FioWorkload, parseFioWorkload } from "../machine/workload-text.ts";
import type { WorkloadResult } from "./result.ts";

export type Workload =
  | { readonly name: "idle"; readonly text: string; readonly seconds: number }
  | { readonly name: "shell"; readonly text: string }
  | { readonly name: "script"; readonly text: string; readonly script: string }
  | { readonly name: "fio"; readonly text: string; readonly fio: FioWorkload };

const SHELL_MS_MAX = 2 ** 31 - 1;
const SCRIPT_MS_MAX = 3_600_000;

/** From `--workload`. Throws UserError. */
export function parseWorkload(text: string): Workload {
  if (text === "shell") return { name: "shell", text };
  if (text === "fio" || text.startsWith("fio:")) return { name: "fio", text, fio: parseFioWorkload(text) };
  if (text.startsWith("script:")) return { name: "script", text, script: readScript(text.slice(7)) };
  const idle = /^idle(?::seconds=(\d{1,4}))?$/.exec(text);
  if (!idle)
    throw new UserError(
      `--workload ${text}: give idle, idle:seconds=N, script:FILE, shell, or ${FIO_USAGE.slice(11)}`,
    );
  return { name: "idle", text, seconds: Number(idle[1] ?? 5) };
}

function readScript(file: string): string {
  try {
    return readFileSync(file, "utf8");
  } catch (error) {
    throw new UserError(`--workload script:${file}: the script cannot be read: ${(error as Error).message}`);
  }
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
    case "script": {
      const { script } = workload;
      const { code } = await agent.run(script, { timeoutMs: SCRIPT_MS_MAX, what: "the script" });
      return { name: "script", options: {}, ...nothing, errors: code === 0 ? 0 : 1 };
    }
    case "fio": {
      const { rw, blockSize, ioDepth, seconds, size } = workload.fio;
      const options = { rw, bs: blockSize, iodepth: ioDepth, seconds, ...(size !== undefined && { size }) };
      return { name: "fio", options, ...(await runFio(agent, workload.fio)) };
    }
  }
}
