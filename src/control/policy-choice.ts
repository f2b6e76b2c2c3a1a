import { existsSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { HostError, UserError } from "../base/errors.ts";
import { memoryPressure } from "../host/pressure.ts";
import { type Parameters, splitChoice } from "../policy/parameters.ts";
import type { PolicyEntry, UnpinPolicy } from "../policy/policy.ts";
import { createFrom, createPolicy } from "../policy/registry.ts";

const loadModule = createRequire(import.meta.url);

/** A choice is a file when it begins as one: names of policies have no slash. */
export const isFile = (choice: string): boolean => /^(\.{0,2}|~)\//.test(choice);

/**
 * The policy of `--policy`, and of PUT /v1/policy: one of ours, or that of a file, "./mine.ts,key=value". Throws UserError
 * when there is none, or when it cannot be used here.
 */
export function choosePolicy(choice: string): UnpinPolicy {
  const policy = isFile(choice) ? createLoaded(choice) : createPolicy(choice);
  const file = policy.pressureFile?.();
  if (file !== undefined)
    try {
      memoryPressure(file);
    } catch (error) {
      if (!(error instanceof HostError)) throw error;
      throw new UserError(
        `--policy ${choice}: ${error.message}; it needs a kernel with CONFIG_PSI and, on some, psi=1 on its command line`,
      );
    }
  return policy;
}

function createLoaded(choice: string): UnpinPolicy {
  const entry = load(splitChoice(choice).name);
  try {
    const policy = createFrom(entry, choice);
    policy.pressureFile?.();
    return policy;
  } catch (error) {
    if (error instanceof UserError) throw error;
    throw new UserError(`--policy ${choice}: create() has failed: ${error}`);
  }
}

function load(file: string): PolicyEntry {
  if (!existsSync(file)) throw new UserError(`--policy ${file}: there is no such file`);
  let module: { readonly default?: unknown };
  try {
    module = loadModule(path.resolve(file));
  } catch (error) {
    throw new UserError(`--policy ${file}: cannot be loaded: ${(error as Error).message.split("\n")[0]}`);
  }
  const entry = module.default;
  if (!isEntry(entry))
    throw new UserError(
      `--policy ${file}: its default export must be { name, summary, source, parameters, create }, as definePolicy() takes it`,
    );
  return entry;
}

function isEntry(entry: unknown): entry is PolicyEntry {
  const { name, parameters, create } = (entry ?? {}) as { [K in keyof PolicyEntry]?: unknown };
  return typeof name === "string" && isParameters(parameters) && typeof create === "function";
}

const isParameters = (parameters: unknown): parameters is Parameters =>
  typeof parameters === "object" &&
  parameters !== null &&
  Object.values(parameters).every((p) => ["count", "share", "time", "text"].includes(p?.kind));

/**
 * A policy of a file, which may have bugs: what it throws is told once, and nothing is asked of it any more. No pin
 * depends on it.
 */
export function guarded(policy: UnpinPolicy, failed: (error: unknown) => void): UnpinPolicy {
  let broken = false;
  /** `otherwise`: what is said when the policy cannot. */
  const safely = <A extends unknown[], R>(otherwise: R, what: (...args: A) => R) => {
    return (...args: A): R => {
      if (broken) return otherwise;
      try {
        return what(...args);
      } catch (error) {
        broken = true;
        failed(error);
        return otherwise;
      }
    };
  };
  return {
    name: policy.name,
    parameters: policy.parameters,
    ...(policy.state && { state: safely({}, () => policy.state!()) }),
    ...(policy.pressureFile && { pressureFile: safely(undefined, () => policy.pressureFile!()) }),
    pinned: safely(undefined, (gfn, now) => policy.pinned(gfn, now)),
    tried: safely(undefined, (gfn, outcome, now) => policy.tried(gfn, outcome, now)),
    candidates: safely(undefined, (now, limit, out) => policy.candidates(now, limit, out)),
  };
}
