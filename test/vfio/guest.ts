/** What the proof machine boots: Debian's kernel, and Node with this checkout's own sources. */
import { execFileSync } from "node:child_process";
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { digest } from "../../src/machine/qemu/cache.ts";
import { command } from "../../src/machine/qemu/command.ts";
import { type Entry, entriesOf } from "../../src/machine/qemu/cpio.ts";
import { ensureGuestWith, type Guest } from "../../src/machine/qemu/guest.ts";
import type { Report } from "../../src/machine/qemu/packages.ts";

const ROOT = join(import.meta.dirname, "../..");
/** Where this checkout is in the guest. */
export const CHECKOUT = "/coiommu";

/** The IOMMU's driver is built in; lzo-rle is zram's compressor. */
const STOCK_MODULES = ["vfio_pci", "vfio_iommu_type1", "zram", "lzo-rle"];

/** As in tsconfig.json beside this file. */
const SOURCES = ["src", "bench", "test/support", "test/vfio", "test/vectors"];
const PLAIN = ["package.json", "bin/coiommu.js"];
/** Of a package, what Node loads on this machine. */
const LOADED = /^(?!.*\/(?:docs?|vendor|musl_x64)\/).*\.(?:[cm]?js|json|node)$/;

/** This Node, with the shared libraries that it is linked with: those of libc too, because they are of one make. */
function nodeFiles(): Entry[] {
  const libraries = execFileSync("ldd", [process.execPath], { encoding: "utf8" }).matchAll(/\/\S+(?= \()/g);
  return [
    { name: "bin/node", contents: readFileSync(process.execPath) },
    ...[...libraries].map(([path]) => ({ name: `lib/${basename(path)}`, contents: readFileSync(path) })),
  ];
}

/** Packages that are not for development only, as `npm ci` has left them. */
function runtimePackages(): string[] {
  const lock = readFileSync(join(ROOT, "node_modules/.package-lock.json"), "utf8");
  const { packages } = JSON.parse(lock) as { packages: Record<string, { dev?: boolean }> };
  const kept = Object.entries(packages).filter(([path, { dev }]) => !dev && existsSync(join(ROOT, path)));
  return kept.flatMap(([path]) => filesIn(path, LOADED));
}

function filesIn(folder: string, wanted: RegExp): string[] {
  const names = readdirSync(join(ROOT, folder), { recursive: true, encoding: "utf8" });
  return names.map((name) => `${folder}/${name}`).filter((path) => wanted.test(path));
}

const packed = (path: string): Entry => ({
  name: `${CHECKOUT.slice(1)}/${path}`,
  contents: readFileSync(join(ROOT, path)),
});

/** As the published package has them: stripping types costs an emulated guest seconds at every start. */
async function compiled(): Promise<Entry[]> {
  const folder = mkdtempSync(join(tmpdir(), "coiommu-compiled-"));
  try {
    const tsc = [process.execPath, join(ROOT, "node_modules/typescript/bin/tsc")];
    const { code, stdout } = await command([...tsc, "-p", import.meta.dirname, "--outDir", folder]);
    if (code !== 0) throw new Error(`tsc: ${stdout}`);
    return entriesOf(folder).map((entry) => ({ ...entry, name: `${CHECKOUT.slice(1)}/${entry.name}` }));
  } finally {
    rmSync(folder, { recursive: true });
  }
}

/** Found, or built into the cache. */
export function ensureVfioGuest(report: Report): Promise<Omit<Guest, "moduleName">> {
  const plain = [...nodeFiles(), ...[...PLAIN, ...runtimePackages()].map(packed)];
  const sources = SOURCES.flatMap((folder) => filesIn(folder, /(?<!\.test)\.ts$/)).map(packed);
  const key = digest(
    ...[...plain, ...sources].flatMap((file) => [file.name, "contents" in file ? file.contents : ""]),
    readFileSync(join(import.meta.dirname, "tsconfig.json")),
  );
  // bin/coiommu.js looks for dist/, as in the published package.
  const dist: Entry = { name: `${CHECKOUT.slice(1)}/dist`, link: "src" };
  const files = async () => [...plain, ...(await compiled()), dist];
  return ensureGuestWith(
    { kind: "vfio-initramfs", stockModules: STOCK_MODULES, modules: [], key, files },
    report,
  );
}
