import { execFileSync } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { cached, digest } from "./cache.ts";
import { type Entry, entriesOf, packCpio } from "./cpio.ts";
import type { Kernel } from "./kernel.ts";
import { GUEST_SOURCES, type GuestModule } from "./module.ts";
import type { Report } from "./packages.ts";
import { modulesWithIndex } from "./stock-modules.ts";
import type { Userland } from "./userland.ts";

/** What the workloads' disks and networks, and a balloon, need where the kernel has it as a module. */
const STOCK_MODULES = ["virtio_pci", "virtio_blk", "virtio_net", "virtio_balloon"];

const FOLDERS = ["dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp"];

/** What a guest has beside busybox, fio and the agent. */
export interface Additions {
  /** Kind of the cache entry. */
  readonly kind: string;
  /** Stock modules of the kernel, by name. */
  readonly stockModules: readonly string[];
  readonly modules: readonly GuestModule[];
  /** Changes when files() does. */
  readonly key: string;
  /** They come after the others, and so in place of those with the same name. */
  files(): Promise<readonly Entry[]>;
}

/** The guest's whole file system. Not compressed: QEMU copies it faster than a guest under TCG unpacks it. */
export async function ensureInitramfs(
  kernel: Kernel,
  userland: Userland,
  { kind, stockModules, modules, key: ofFiles, files }: Additions,
  report: Report,
): Promise<string> {
  const agent = readFileSync(join(GUEST_SOURCES, "agent/init"));
  const stock = [...STOCK_MODULES, ...stockModules];
  const keys = [...modules.map((module) => module.key), ...stock, ofFiles];
  const key = digest(ownSources(), kernel.key, userland.key, ...keys, agent);
  const folder = await cached(kind, key, async (temporary) => {
    report("packing the guest's file system");
    const entries = [
      ...entriesOf(userland.root),
      ...appletLinks(join(userland.root, "bin/busybox")),
      ...modulesWithIndex(kernel, stock, modules),
      { name: "init", contents: agent },
      { name: "sbin", link: "bin" }, // the kernel calls /sbin/modprobe
      { name: "etc/passwd", contents: Buffer.from("root::0:0:root:/root:/bin/sh\n") },
      ...FOLDERS.map((name): Entry => ({ name, folder: true })),
      ...(await files()),
    ];
    writeFileSync(join(temporary, "initramfs.cpio"), packCpio(withParents(entries)));
  });
  return join(folder, "initramfs.cpio");
}

/** A change of what packs the archive makes another archive. */
const ownSources = (): string =>
  ["initramfs", "cpio", "stock-modules"]
    .map((name) => readFileSync(import.meta.filename.replace(/initramfs(?=\.[jt]s$)/, name)))
    .join();

function appletLinks(busybox: string): Entry[] {
  const applets = execFileSync(busybox, ["--list"], { encoding: "utf8" }).trim().split("\n");
  return applets
    .filter((name) => name !== "busybox")
    .map((name) => ({ name: `bin/${name}`, link: "busybox" }));
}

/** Every folder once and before what is in it. */
function withParents(entries: readonly Entry[]): Entry[] {
  const folders = new Set<string>();
  for (const entry of entries) {
    const ofEntry = "folder" in entry ? entry.name : dirname(entry.name);
    const parts = ofEntry === "." ? [] : ofEntry.split("/");
    parts.forEach((_, i) => {
      folders.add(parts.slice(0, i + 1).join("/"));
    });
  }
  const files = entries.filter((entry) => !("folder" in entry));
  return [...[...folders].sort().map((name): Entry => ({ name, folder: true })), ...files];
}
