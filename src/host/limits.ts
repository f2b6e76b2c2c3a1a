import fs from "node:fs";

/** capabilities(7). */
const CAP_IPC_LOCK = 14n;

/** What this process may lock or pin, in bytes; Infinity without a limit. CAP_IPC_LOCK overrides it. */
export function memlockLimit(): number {
  const match = /^Max locked memory\s+(\S+)/m.exec(fs.readFileSync("/proc/self/limits", "latin1"));
  return !match || match[1] === "unlimited" ? Number.POSITIVE_INFINITY : Number(match[1]);
}

/** Whether CAP_IPC_LOCK is effective, so that the memlock limit does not count. */
export function canExceedMemlock(): boolean {
  const match = /^CapEff:\s+([0-9a-f]+)/m.exec(fs.readFileSync("/proc/self/status", "latin1"));
  return match !== null && ((BigInt(`0x${match[1]}`) >> CAP_IPC_LOCK) & 1n) === 1n;
}
