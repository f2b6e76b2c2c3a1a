import { setTimeout as sleep } from "node:timers/promises";

/** Wait until `condition` holds; false when it does not in time. */
export async function eventually(
  condition: () => boolean | Promise<boolean>,
  timeoutMs = 30_000,
): Promise<boolean> {
  for (let waited = 0; !(await condition()); waited += 50) {
    if (waited >= timeoutMs) return false;
    await sleep(50);
  }
  return true;
}
