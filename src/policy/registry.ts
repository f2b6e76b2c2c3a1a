import { UserError } from "../base/errors.ts";
import { LruPolicy } from "./lru.ts";
import type { UnpinPolicy } from "./policy.ts";

interface PolicyEntry {
  readonly name: string;
  readonly summary: string;
  create(): UnpinPolicy;
}

/** Never unpins: for comparison, and for guests whose buffers never change. */
const off: UnpinPolicy = { name: "off", parameters: {}, pinned() {}, tried() {}, candidates() {} };

export const policies: readonly PolicyEntry[] = [
  {
    name: "lru",
    summary: "each pass tries all pinned frames; unpinned by the second pass that finds it idle",
    create: () => new LruPolicy(),
  },
  { name: "off", summary: "pins on request, never unpins", create: () => off },
];

/** From `--policy NAME`. Throws UserError for an unknown name or parameter. */
export function createPolicy(text: string): UnpinPolicy {
  const [name = "", ...parameters] = text.split(",");
  const entry = policies.find((p) => p.name === name);
  const known = policies.map((p) => p.name).join(", ");
  if (!entry) throw new UserError(`--policy ${text}: no policy is named "${name}"; there are ${known}`);
  if (parameters.length) throw new UserError(`--policy ${text}: "${name}" has no parameters`);
  return entry.create();
}
