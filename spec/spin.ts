import { readFileSync } from "node:fs";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { command } from "../src/machine/qemu/command.ts";
import type { HostTool } from "../src/machine/qemu/packages.ts";
import { ASSERTIONS, type Property, type Run } from "./runs.ts";

export const MODEL = fileURLToPath(new URL("coiommu.pml", import.meta.url));

/** Only tests need these: `coiommu doctor` does not ask for them. */
export const SPEC_TOOLS: readonly HostTool[] = [
  { package: "spin", purpose: "checks the model of the protocol", program: "spin" },
  { package: "gcc", purpose: "compiles what spin generates", program: "gcc" },
  { package: "libc6-dev", purpose: "compiles what spin generates", library: "libc.so" },
];

/** Of one search. A search that hits one is no verdict. */
const LIMITS = { memoryMb: 3500, depth: 3_000_000 };
const TIME_LIMIT_MS = 600_000;

export interface Verdict {
  /** What spin found wrong first; undefined: nothing. */
  readonly found: Property | "acceptance cycle" | "stuck" | undefined;
  /** The search saw every state that can be reached, or stopped at what it found. */
  readonly states: number;
  readonly seconds: number;
  /** What the configuration asserts, as spin prints it. */
  readonly assertions: readonly string[];
  /** "process:line" of every statement, and of those that no state reaches. */
  readonly lines: ReadonlySet<string>;
  readonly unreached: ReadonlySet<string>;
}

/** Check one configuration of a model exhaustively. Throws when the search itself did not go well. */
export async function check(run: Run, twin?: string, limits = LIMITS): Promise<Verdict> {
  const folder = await mkdtemp(join(tmpdir(), "coiommu-spec-"));
  const step = async (...argv: string[]): Promise<string> => {
    const { code, stdout, stderr } = await command(argv, { cwd: folder, timeoutMs: TIME_LIMIT_MS });
    if (code !== 0) throw new Error(`${argv[0]} ended with ${code}: ${stdout.slice(-1000)}${stderr}`);
    return stdout;
  };
  try {
    const defines = Object.entries({ ...run.defines, ...(twin && { [`TWIN_${twin}`]: true }) });
    await step("spin", "-a", ...defines.map(([k, v]) => `-D${k}${v === true ? "" : `=${v}`}`), MODEL);
    const kind = run.liveness ? "-DNFAIR=3" : "-DSAFETY";
    // A twin's search ends early: not worth the optimizer's time.
    const optimize = twin ? "-O0" : "-O2";
    await step("gcc", optimize, "-w", kind, `-DMEMLIM=${limits.memoryMb}`, "-o", "pan", "pan.c");
    const how = run.liveness ? ["-a", "-f", "-N", run.liveness] : [];
    const output = await step("./pan", `-m${limits.depth}`, ...how);
    return verdict(output, readFileSync(join(folder, "pan.m"), "utf8"));
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

/** `output`: pan's. `generated`: its transitions, pan.m, where each statement of the model is named. */
export function verdict(output: string, generated: string): Verdict {
  const found = firstError(output);
  const limit = /^error: max search depth too small|reached -DMEMLIM bound|out of memory/m.exec(output)?.[0];
  // At an error the search ends, and says so.
  const partial = found ? undefined : /Search not completed|interrupted|truncated/i.exec(output)?.[0];
  if (limit || partial) throw new Error(`the search is not exhaustive: ${limit ?? partial}`);
  if (!/^Full statespace search for:/m.test(output)) throw new Error(`not a full search: ${output}`);
  const number = (pattern: RegExp) => Number(pattern.exec(output)?.[1] ?? Number.NaN);
  if (number(/errors: (\d+)$/m) !== (found ? 1 : 0))
    throw new Error(`pan's count of errors is not that of what it tells: ${output}`);
  return {
    found,
    states: number(/^\s*([\d.e+]+) states, stored/m),
    seconds: number(/elapsed time ([\d.e+-]+) seconds/),
    assertions: [...generated.matchAll(/spin_assert\(.*?, "(.*?)", II/g)].map((m) => m[1]!),
    ...coverage(output, generated),
  };
}

function firstError(output: string): Verdict["found"] {
  const message = /^pan:\d+: (.*) \(at depth \d+\)$/m.exec(output)?.[1];
  if (message === undefined) return undefined;
  if (message === "acceptance cycle") return message;
  if (message === "invalid end state") return "stuck";
  const assertion = /^assertion violated (.*)$/.exec(message)?.[1];
  const property = assertion === undefined ? undefined : propertyOf(assertion);
  if (!property) throw new Error(`pan found something that has no name: ${message}`);
  return property;
}

/** The longest beginning that fits, because one may begin as another. */
export function propertyOf(assertion: string): Property | undefined {
  const text = assertion.replaceAll(" ", "");
  const fitting = Object.entries(ASSERTIONS).filter(([, beginning]) => text.startsWith(beginning));
  return fitting.sort((a, b) => b[1].length - a[1].length)[0]?.[0] as Property | undefined;
}

/** By line, of each process: a line is reached when a state on it is. */
function coverage(output: string, generated: string): Pick<Verdict, "lines" | "unreached"> {
  const states = new Map<string, string>(); // "process state" -> "process:line"
  let process = "";
  const statements = /\/\* PROC (\S+) \*\/|\/\/ STATE (\d+) - \S+:(\d+) - \[(.*)\] \(/g;
  for (const [, named, state, line, text] of generated.matchAll(statements))
    if (named) process = named;
    else if (text !== "-end-") states.set(`${process} ${state}`, `${process}:${line}`);
  const lines = new Set(states.values());
  for (const [, named, listed] of output.matchAll(/^unreached in proctype (\S+)\n((?:\t.*\n)*)/gm))
    for (const [, state] of listed!.matchAll(/:\d+, state (\d+),/g)) states.delete(`${named} ${state}`);
  const reached = new Set(states.values());
  return { lines, unreached: new Set([...lines].filter((line) => !reached.has(line))) };
}
