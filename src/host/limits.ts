import fs from "node:fs";
import { HostError } from "../base/errors.ts";
import { libc, systemCall } from "./libc.ts";

/** capabilities(7). */
const CAP_IPC_LOCK = 14n;
/** getrlimit(2), and its value for "no limit". */
const RLIMIT_MEMLOCK = 8;
const RLIM_INFINITY = 2n ** 64n - 1n;

/** What pins of guest memory need beside it: the rest of an extent while that is split, and what is counted of rings. */
export const MEMLOCK_SLACK = 2 ** 20;

/** What this process may lock or pin, in bytes; Infinity without a limit. CAP_IPC_LOCK overrides it. */
export const memlockLimit = (): number => limits()[0];
/** What it may raise that to. */
export const memlockHardLimit = (): number => limits()[1];

function limits(): [soft: number, hard: number] {
  const match = /^Max locked memory\s+(\S+)\s+(\S+)/m.exec(fs.readFileSync("/proc/self/limits", "latin1"));
  const number = (text: string | undefined) =>
    text === undefined || text === "unlimited" ? Number.POSITIVE_INFINITY : Number(text);
  return [number(match?.[1]), number(match?.[2])];
}

/**
 * Raise what this process may lock or pin as far as it may, unless it may `need` bytes already; true when it may now. It
 * needs nobody's leave up to the hard limit, and CAP_SYS_RESOURCE beyond.
 */
export function raiseMemlock(need: number): boolean {
  if (canExceedMemlock() || memlockLimit() >= need) return true;
  const now = new BigUint64Array(2);
  // SAFETY: struct rlimit is two 64-bit numbers, soft and hard.
  systemCall("getrlimit", () => libc.getrlimit(RLIMIT_MEMLOCK, now));
  const hard = now[1]!;
  if (hard < BigInt(need) && setMemlock(RLIM_INFINITY)) return true;
  setMemlock(hard);
  return hard >= BigInt(need);
}

/** False where the kernel does not allow it. */
function setMemlock(limit: bigint): boolean {
  try {
    // SAFETY: as above; the kernel reads it only.
    systemCall("setrlimit", () => libc.setrlimit(RLIMIT_MEMLOCK, BigUint64Array.of(limit, limit)));
    return true;
  } catch (error) {
    if (!(error instanceof HostError) || error.errno !== "EPERM") throw error;
    return false;
  }
}

/** What to type, or to write, so that `need` bytes may be locked or pinned. */
export function memlockFix(need: number): string {
  const kib = Math.ceil(need / 1024);
  return `\`ulimit -l ${kib}\`, or LimitMEMLOCK=${kib}K of the service`;
}

/** Whether CAP_IPC_LOCK is effective, so that the memlock limit does not count. */
export function canExceedMemlock(): boolean {
  const match = /^CapEff:\s+([0-9a-f]+)/m.exec(fs.readFileSync("/proc/self/status", "latin1"));
  return match !== null && ((BigInt(`0x${match[1]}`) >> CAP_IPC_LOCK) & 1n) === 1n;
}
