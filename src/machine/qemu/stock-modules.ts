import { execFileSync } from "node:child_process";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { UserError } from "../../base/errors.ts";
import type { Entry } from "./cpio.ts";
import type { Kernel } from "./kernel.ts";

/** modprobe takes - for _ and the other way round. */
const canonical = (name: string) => name.replaceAll("-", "_");
const nameOf = (path: string) => canonical(path.replace(/^.*\//, "").replace(/\.ko(\.xz)?$/, ""));

interface Loaded {
  /** Below /lib/modules/RELEASE. */
  path: string;
  contents: Buffer;
  depends: string[];
  aliases: string[];
}

/**
 * The kernel modules that a guest gets: stock ones by name with all they depend on, and `own`, with the index
 * files that modprobe reads.
 */
export function modulesWithIndex(
  kernel: Kernel,
  wanted: readonly string[],
  own: readonly { name: string; path: string }[],
): Entry[] {
  const available = new Map(
    readdirSync(kernel.modules, { recursive: true, encoding: "utf8" })
      .filter((path) => /\.ko(\.xz)?$/.test(path))
      .map((path) => [nameOf(path), path]),
  );
  const builtin = new Set(
    readFileSync(join(kernel.modules, "modules.builtin"), "utf8").split("\n").map(nameOf),
  );
  const loaded = new Map<string, Loaded>();
  for (const { name, path } of own)
    loaded.set(canonical(name), describe(`extra/${name}.ko`, readFileSync(path)));
  const pending = [...wanted.map(canonical), ...[...loaded.values()].flatMap((module) => module.depends)];
  for (const name of pending) {
    if (loaded.has(name) || builtin.has(name)) continue;
    const path = available.get(name);
    if (path === undefined) throw new UserError(`Debian's kernel ${kernel.release} has no module ${name}`, 1);
    const module = describe(path.replace(/\.xz$/, ""), uncompressed(join(kernel.modules, path)));
    loaded.set(name, module);
    pending.push(...module.depends);
  }
  return entries(`lib/modules/${kernel.release}`, loaded);
}

const uncompressed = (path: string): Buffer =>
  path.endsWith(".xz")
    ? execFileSync("xz", ["--decompress", "--stdout", path], { maxBuffer: 2 ** 26 })
    : readFileSync(path);

function describe(path: string, contents: Buffer): Loaded {
  // The section .modinfo is a list of NUL-terminated "key=value".
  const values = (key: string) =>
    [...contents.toString("latin1").matchAll(new RegExp(`(?<=\\0)${key}=([^\\0]*)\\0`, "g"))].map(
      (match) => match[1]!,
    );
  const depends = values("depends").flatMap((list) => list.split(",").filter((name) => name !== ""));
  return { path, contents, depends: depends.map(canonical), aliases: values("alias") };
}

function entries(root: string, loaded: ReadonlyMap<string, Loaded>): Entry[] {
  const inLoadOrder = (name: string, order: string[] = []): string[] => {
    const module = loaded.get(name);
    if (module === undefined || order.includes(module.path)) return order;
    for (const next of module.depends) inLoadOrder(next, order);
    order.push(module.path);
    return order;
  };
  // modprobe loads a line from its end to its start: the module itself last.
  const dependencies = [...loaded.keys()].map((name) => {
    const [self, ...others] = inLoadOrder(name).reverse();
    return `${self}: ${others.join(" ")}\n`;
  });
  const aliases = [...loaded].flatMap(([name, module]) =>
    module.aliases.map((alias) => `alias ${alias} ${name}\n`),
  );
  const text = (name: string, lines: string[]): Entry => ({
    name: `${root}/${name}`,
    contents: Buffer.from(lines.join("")),
  });
  return [
    ...[...loaded.values()].map(({ path, contents }): Entry => ({ name: `${root}/${path}`, contents })),
    text("modules.dep", dependencies),
    text("modules.alias", aliases),
    text("modules.symbols", []),
  ];
}
