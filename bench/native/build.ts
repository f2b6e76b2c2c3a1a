/**
 * Builds C against the kernel module's own guest/linux/units.c, in user space: bench/native/shim stands in for the
 * kernel's headers.
 */
import { execFileSync } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

const here = (relative: string) => fileURLToPath(new URL(relative, import.meta.url));

/** As Kbuild compiles the module, as far as it is about speed. */
const FLAGS = ["-O2", "-std=gnu11", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror"];
const INCLUDES = ["shim", ".", "../../guest/linux"].map((folder) => `-I${here(folder)}`);
const SOURCES = [here("../../guest/linux/units.c"), here("table.c")];

/** A compiled file that is gone after `using`. Throws what gcc says. */
export class NativeBinary implements Disposable {
  readonly path: string;
  readonly #folder = mkdtempSync(join(tmpdir(), "coiommu-native-"));

  constructor(source: URL, kind: "program" | "library") {
    this.path = join(this.#folder, kind);
    const shape = kind === "library" ? ["-shared", "-fPIC", "-fvisibility=hidden"] : [];
    try {
      execFileSync(
        "gcc",
        [...FLAGS, ...shape, ...INCLUDES, "-o", this.path, ...SOURCES, fileURLToPath(source)],
        {
          stdio: ["ignore", "ignore", "pipe"],
        },
      );
    } catch (error) {
      this[Symbol.dispose]();
      throw error;
    }
  }

  [Symbol.dispose](): void {
    rmSync(this.#folder, { recursive: true, force: true });
  }
}
