/**
 * Builds C in user space, with the kernel module's own guest/linux/units.c if it is to be measured: bench/native/shim
 * stands in for the kernel's headers.
 */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { command } from "../../src/machine/qemu/command.ts";
import { ensureHostTools, type HostTool, type Report } from "../../src/machine/qemu/packages.ts";

const here = (relative: string) => fileURLToPath(new URL(relative, import.meta.url));

/** As Kbuild compiles the module, as far as it is about speed. */
const FLAGS = ["-O2", "-std=gnu11", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror"];
const INCLUDES = ["shim", ".", "../../guest/linux"].map((folder) => `-I${here(folder)}`);
/** The module's counting. */
export const UNITS = [here("../../guest/linux/units.c"), here("table.c")];

const TOOLS: readonly HostTool[] = [
  { package: "gcc", purpose: "compiles the module's C in user space", program: "gcc" },
  { package: "libc6-dev", purpose: "has the C library's headers", library: "crt1.o" },
];

/** A compiled file; its owner removes it. */
export class NativeBinary implements Disposable {
  readonly path: string;
  readonly #folder: string;

  private constructor(folder: string, kind: string) {
    this.#folder = folder;
    this.path = join(folder, kind);
  }

  /** Throws what gcc says, or what is to be installed. */
  static async build(
    source: URL,
    kind: "program" | "library",
    report: Report,
    others: readonly string[] = UNITS,
  ): Promise<NativeBinary> {
    await ensureHostTools(report, TOOLS, "compiling the module's C in user space");
    const binary = new NativeBinary(mkdtempSync(join(tmpdir(), "coiommu-native-")), kind);
    const shape = kind === "library" ? ["-shared", "-fPIC", "-fvisibility=hidden"] : [];
    const files = [...others, fileURLToPath(source)];
    const { code, stderr } = await command([
      "gcc",
      ...FLAGS,
      ...shape,
      ...INCLUDES,
      "-o",
      binary.path,
      ...files,
    ]);
    if (code === 0) return binary;
    binary[Symbol.dispose]();
    throw new Error(`gcc could not compile ${fileURLToPath(source)}:\n${stderr}`);
  }

  [Symbol.dispose](): void {
    rmSync(this.#folder, { recursive: true, force: true });
  }
}
