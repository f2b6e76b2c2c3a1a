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

/** A kind of policy, or of speculation, that makes a T. */
interface Entry<T> {
  readonly name: string;
  readonly parameters: Parameters;
  create(values: ValuesOf<Parameters>): T;
}
type Created<T> = T & Pick<UnpinPolicy, "name" | "parameters">;

/** What an entry makes of "NAME,key=value,…". Throws UserError for parameters that it does not take. */
export function createFrom<T extends object>(
  entry: Entry<T>,
  choice: string,
  option = "--policy",
): Created<T> {
  const parameters = parseValues(entry.parameters, splitChoice(choice).words, `${option} ${choice}`);
  return Object.assign(entry.create(parameters as ValuesOf<Parameters>), { name: entry.name, parameters });
}

/** What the entry of the name in `choice` makes of it. Throws UserError for an unknown name or parameter. */
export function createNamed<T extends object>(
  entries: readonly Entry<T>[],
  choice: string,
  option: string,
  kind: string,
): Created<T> {
  const { name } = splitChoice(choice);
  const entry = entries.find((e) => e.name === name);
  const known = entries.map((e) => e.name).join(", ");
  if (!entry) throw new UserError(`${option} ${choice}: no ${kind} is named "${name}"; there are ${known}`);
  return createFrom(entry, choice, option);
}

/** From `--policy NAME[,key=value…]`. Throws UserError for an unknown name or parameter. */
export const createPolicy = (choice: string): UnpinPolicy =>
  createNamed(policies, choice, "--policy", "policy");

/** Give a policy or a speculation the parameters of another choice of the same name; it keeps what it knows. */
export const reconfigure = (
  { parameters: known }: Pick<UnpinPolicy, "parameters">,
  { parameters }: Pick<UnpinPolicy, "parameters">,
): void => void Object.assign(known, parameters);
