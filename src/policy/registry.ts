import { UserError } from "../base/errors.ts";
import { clock } from "./clock.ts";
import { generations } from "./generations.ts";
import { lru } from "./lru.ts";
import { type Parameters, parseValues, splitChoice, type ValuesOf } from "./parameters.ts";
import { definePolicy, type PolicyEntry, type UnpinPolicy } from "./policy.ts";
import { pressure } from "./pressure.ts";
import { workingSet } from "./working-set.ts";

const off = definePolicy({
  name: "off",
  summary: "pins on request, never unpins; only at the quota",
  source: "for comparison, and for guests whose buffers never change",
  parameters: {},
  create: () => ({ pinned() {}, tried() {}, candidates() {} }),
});

export const policies: readonly PolicyEntry[] = [
  lru,
  generations,
  clock,
  workingSet,
  pressure,
  off,
] as readonly PolicyEntry[];

/** The entry of a name. Throws UserError for one that no policy has. */
export function policyNamed(name: string, choice = name): PolicyEntry {
  const entry = policies.find((p) => p.name === name);
  const known = policies.map((p) => p.name).join(", ");
  if (!entry) throw new UserError(`--policy ${choice}: no policy is named "${name}"; there are ${known}`);
  return entry;
}

/** What an entry makes of "NAME,key=value,…". Throws UserError for parameters that it does not take. */
export function createFrom(entry: PolicyEntry, choice: string): UnpinPolicy {
  const parameters = parseValues(entry.parameters, splitChoice(choice).words, `--policy ${choice}`);
  return Object.assign(entry.create(parameters as ValuesOf<Parameters>), { name: entry.name, parameters });
}

/** From `--policy NAME[,key=value…]`. Throws UserError for an unknown name or parameter. */
export const createPolicy = (choice: string): UnpinPolicy =>
  createFrom(policyNamed(splitChoice(choice).name, choice), choice);

/** Give a policy the parameters of another choice of the same name; it keeps what it knows. */
export const reconfigure = (policy: UnpinPolicy, { parameters }: Pick<UnpinPolicy, "parameters">): void =>
  void Object.assign(policy.parameters, parameters);
