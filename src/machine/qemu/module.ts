import { copyFileSync, mkdirSync, readdirSync, readFileSync } from "node:fs";
import { availableParallelism } from "node:os";
import { dirname, join } from "node:path";
import { UserError } from "../../base/errors.ts";
import { cached, digest } from "./cache.ts";
import { command } from "./command.ts";
import type { Kernel } from "./kernel.ts";
import type { Report } from "./packages.ts";

export interface GuestModule {
  name: string;
  /** The .ko file, without debug information. */
  path: string;
  key: string;
}

/** The folder `guest` of this package: the same from src/machine/qemu and from dist/machine/qemu. */
export const GUEST_SOURCES = join(import.meta.dirname, "../../../guest");

/** Compile the kernel module in `sources` out of tree, in the cache, for `kernel`. */
export async function ensureModule(kernel: Kernel, sources: string, report: Report): Promise<GuestModule> {
  const files = readdirSync(sources, { recursive: true, encoding: "utf8" })
    .filter((file) => /(\.[chS]|^Kbuild|^Makefile)$/.test(file) && !file.endsWith(".mod.c"))
    .sort();
  if (files.length === 0) throw new UserError(`${sources} holds no sources of the guest's kernel module`, 1);
  const key = digest(kernel.key, ...files.flatMap((file) => [file, readFileSync(join(sources, file))]));
  const folder = await cached("module", key, async (temporary) => {
    report(`compiling the guest's kernel module for ${kernel.release}`);
    for (const file of files) {
      mkdirSync(dirname(join(temporary, file)), { recursive: true });
      copyFileSync(join(sources, file), join(temporary, file));
    }
    await compile(kernel, temporary, sources);
  });
  const module = readdirSync(folder).find((file) => file.endsWith(".ko"))!;
  return { name: module.slice(0, -".ko".length), path: join(folder, module), key };
}

async function compile(kernel: Kernel, folder: string, sources: string): Promise<void> {
  const jobs = `-j${availableParallelism()}`;
  const make = await command(["make", "-s", jobs, "-C", kernel.headers, `M=${folder}`, "modules"]);
  if (make.code !== 0) {
    const said = `${make.stdout}${make.stderr}`.replaceAll(folder, sources).trim();
    throw new UserError(`the guest's kernel module does not compile for ${kernel.release}:\n${said}`, 1);
  }
  const modules = readdirSync(folder).filter((file) => file.endsWith(".ko"));
  if (modules.length !== 1)
    throw new UserError(`${sources} makes ${modules.length} kernel modules, not one: see its Kbuild`, 1);
  await command(["strip", "--strip-debug", join(folder, modules[0]!)]);
}
