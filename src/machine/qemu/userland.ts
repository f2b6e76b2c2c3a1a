import {
  copyFileSync,
  existsSync,
  mkdirSync,
  readFileSync,
  realpathSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { dirname, join } from "node:path";
import { UserError } from "../../base/errors.ts";
import type { Apt } from "./apt.ts";
import { cached, digest } from "./cache.ts";
import { command } from "./command.ts";
import type { Report } from "./packages.ts";
import type { PackageSet } from "./selection.ts";

export interface Userland {
  /** A tree with exactly the files that the guest gets: busybox, fio, its libraries. */
  root: string;
  key: string;
}

const LIBRARY_FOLDERS = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];

export const userlandKey = (packages: PackageSet): string =>
  digest(packages.key, readFileSync(import.meta.filename));

/**
 * Debian's busybox and fio. Its fio is linked with the clients of Ceph, Gluster, NBD, RDMA and persistent memory:
 * 90 MB of libraries that a guest would load, relocate at each start and hold in its memory, for I/O engines that
 * we never ask for. One library of trapping functions takes their place (2 % of the size); a call would end fio.
 */
export async function ensureUserland(packages: PackageSet, apt: Apt, report: Report): Promise<Userland> {
  const key = userlandKey(packages);
  const root = await cached("userland", key, async (temporary) => {
    report("downloading Debian's busybox and fio for the guest");
    const unpacked = join(temporary, ".unpacked");
    mkdirSync(unpacked);
    await apt.unpack(packages.names, unpacked);
    install(findBinary(unpacked, "busybox"), join(temporary, "bin/busybox"));
    await installWithLibraries(unpacked, findBinary(unpacked, "fio"), temporary);
    rmSync(unpacked, { recursive: true });
  });
  return { root, key };
}

function findBinary(root: string, name: string): string {
  const found = ["usr/bin", "bin"].map((folder) => join(root, folder, name)).find((path) => existsSync(path));
  if (!found) throw new UserError(`Debian's package of ${name} has no executable ${name}`, 1);
  return found;
}

function install(from: string, to: string): void {
  mkdirSync(dirname(to), { recursive: true });
  copyFileSync(realpathSync(from), to);
}

async function installWithLibraries(unpacked: string, binary: string, root: string): Promise<void> {
  install(binary, join(root, "bin/fio"));
  symlinkSync("lib", join(root, "lib64")); // where every program looks for the loader, a library of libc's
  const kept = new Map<string, string>();
  const absent = new Set<string>();
  const pending = [binary];
  for (const file of pending) {
    for (const name of await neededLibraries(file)) {
      if (kept.has(name) || absent.has(name)) continue;
      const path = findLibrary(unpacked, name);
      if (path === undefined) absent.add(name);
      else {
        kept.set(name, path);
        pending.push(path);
        install(path, join(root, "lib", name));
      }
    }
  }
  const wanted = await undefinedFunctions(binary, [...kept.values()]);
  if (absent.size > 0) await buildTraps(wanted, [...absent], join(root, "lib"));
}

const findLibrary = (root: string, name: string): string | undefined =>
  LIBRARY_FOLDERS.map((folder) => join(root, folder, name)).find((path) => existsSync(path));

async function neededLibraries(file: string): Promise<string[]> {
  const { stdout } = await command(["readelf", "--dynamic", "--wide", file]);
  return [...stdout.matchAll(/\(NEEDED\).*\[(.+)\]/g)].map((match) => match[1]!);
}

interface Symbol {
  name: string;
  /** "" for a library without symbol versions. */
  version: string;
}

/** What `binary` imports and none of `libraries` exports. */
async function undefinedFunctions(binary: string, libraries: string[]): Promise<Symbol[]> {
  const symbols = async (file: string) => {
    const { stdout } = await command(["readelf", "--dyn-syms", "--wide", file]);
    return [...stdout.matchAll(/ (GLOBAL|WEAK) +DEFAULT +(\w+) (\w+)(?:@@?([\w.]+))?/g)].map((match) => ({
      weak: match[1] === "WEAK",
      imported: match[2] === "UND",
      name: match[3]!,
      version: match[4] ?? "",
    }));
  };
  const exported = (await Promise.all(libraries.map(symbols))).flat().filter((symbol) => !symbol.imported);
  const provided = new Set(exported.map((symbol) => symbol.name));
  return (await symbols(binary)).filter(
    ({ imported, weak, name }) => imported && !weak && !provided.has(name),
  );
}

/** One library that defines `functions`, each as a trap, under all the names in `libraries`. */
async function buildTraps(functions: Symbol[], libraries: string[], folder: string): Promise<void> {
  const source = functions.map(({ name }) => `void ${name}(void) { __builtin_trap(); }`).join("\n");
  const versions = [...Map.groupBy(functions, ({ version }) => version)]
    .filter(([version]) => version !== "")
    .map(([version, symbols]) => `${version} { ${symbols.map(({ name }) => `${name};`).join(" ")} };`);
  const [library, ...others] = libraries as [string, ...string[]];
  const sources = [join(folder, "traps.c"), join(folder, "traps.map")] as const;
  writeFileSync(sources[0], source);
  writeFileSync(sources[1], versions.join("\n"));
  const options = [
    "-shared",
    "-fPIC",
    "-nostdlib",
    "-fno-builtin",
    "-w",
    `-Wl,--version-script=${sources[1]}`,
  ];
  const compiled = await command(["gcc", ...options, "-o", join(folder, library), sources[0]]);
  if (compiled.code !== 0)
    throw new UserError(`gcc could not build the stand-in for fio's libraries:\n${compiled.stderr}`, 1);
  for (const name of others) symlinkSync(library, join(folder, name));
  for (const path of sources) rmSync(path);
}
