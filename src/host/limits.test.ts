import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { readFileSync } from "node:fs";
import test from "node:test";
import { nativeUnavailable } from "./libc.ts";

// In CI a missing real part fails.
const skip = process.env.CI ? false : (nativeUnavailable() ?? false);
const KIB = 1024;

/** In a process with these limits: whether `need` bytes may be locked, and [soft, hard] limit then. */
function raised(need: number, limits: string, ...drop: string[]): unknown {
  const child = `
    const { memlockLimit, memlockHardLimit, raiseMemlock } = await import(${JSON.stringify(import.meta.resolve("./limits.ts"))});
    const number = (n) => Number.isFinite(n) ? n : "unlimited";
    console.log(JSON.stringify([raiseMemlock(${need}), number(memlockLimit()), number(memlockHardLimit())]));`;
  const dropped = process.getuid?.() === 0 && drop.length > 0;
  const command = [
    ...(dropped ? ["setpriv", `--bounding-set=${drop}`, `--inh-caps=${drop}`] : []),
    ...["prlimit", `--memlock=${limits}`, process.execPath, "--input-type=module", "-e", child],
  ];
  const run = spawnSync(command[0]!, command.slice(1), { encoding: "utf8", cwd: "/" });
  assert.equal(run.status, 0, run.stderr);
  return JSON.parse(run.stdout);
}

const UNPRIVILEGED = ["-ipc_lock", "-sys_resource"];
const limits = (soft: number, hard: number) => `${soft}:${hard}`;

test("the soft limit is raised to the hard one, when the need is between them", { skip }, () => {
  assert.deepEqual(raised(100 * KIB, limits(KIB, 200 * KIB), ...UNPRIVILEGED), [true, 200 * KIB, 200 * KIB]);
});

test("a limit that suffices is left as it is", { skip }, () => {
  assert.deepEqual(raised(KIB, limits(KIB, 200 * KIB), ...UNPRIVILEGED), [true, KIB, 200 * KIB]);
});

test("a need beyond the hard limit: there is no more than that, and it is told", { skip }, () => {
  assert.deepEqual(raised(201 * KIB, limits(KIB, 200 * KIB), ...UNPRIVILEGED), [false, 200 * KIB, 200 * KIB]);
});

/** capabilities(7). */
const has = (capability: bigint) => {
  const [, mask] = /^CapEff:\s+([0-9a-f]+)/m.exec(readFileSync("/proc/self/status", "latin1"))!;
  return ((BigInt(`0x${mask}`) >> capability) & 1n) === 1n;
};

test("the hard limit is raised with CAP_SYS_RESOURCE, and only with it", { skip }, () => {
  const expected = has(24n) ? [true, "unlimited", "unlimited"] : [false, KIB, KIB];
  assert.deepEqual(raised(201 * KIB, limits(KIB, KIB), "-ipc_lock"), expected);
});

test("with CAP_IPC_LOCK no limit counts, and none is raised", {
  skip: has(14n) ? skip : "needs CAP_IPC_LOCK",
}, () => {
  assert.deepEqual(raised(201 * KIB, limits(KIB, 200 * KIB)), [true, KIB, 200 * KIB]);
});
