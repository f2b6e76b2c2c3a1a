import fs from "node:fs";
import { type Errno, HostError } from "../base/errors.ts";

/**
 * The share of the last 10 s in which some task waited for memory, 0 to 1: `some avg10` of /proc/pressure/memory, or of a
 * cgroup's memory.pressure. Linux, Documentation/accounting/psi.rst. Throws HostError.
 */
export function memoryPressure(file: string): number {
  let text: string;
  try {
    text = fs.readFileSync(file, "latin1");
  } catch (error) {
    throw new HostError("open", (error as { code: Errno }).code, file);
  }
  const match = /^some avg10=(\d+(?:\.\d+)?) /m.exec(text);
  if (!match) throw new HostError("read", "EINVAL", `${file} does not say "some avg10="`);
  return Math.min(1, Number(match[1]) / 100);
}
