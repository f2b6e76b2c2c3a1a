import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { UserError } from "../../base/errors.ts";
import { Apt } from "./apt.ts";
import { cached, cachePath, digest } from "./cache.ts";

/** The Debian packages that a guest is made of, with the versions that this machine's lists offer. */
export interface Selection {
  kernelRelease: string;
  kernel: PackageSet;
  userland: PackageSet;
}

export interface PackageSet {
  names: string[];
  /** Names and versions: the cache's key. */
  key: string;
}

/** Depends on the newest kernel of the flavour for virtual machines. */
const KERNEL_META_PACKAGE = "linux-image-cloud-amd64";

/** fio's libraries that a guest uses; userland.ts tells what becomes of the others. */
const FIO_LIBRARIES = /^(libc6|libaio1|libnuma1|zlib1g)(t64)?$/;

/** Looked up again only when the lists change: apt-cache takes seconds where it may not keep a cache of its own. */
export async function selectPackages(apt: Apt): Promise<Selection> {
  if (!Apt.hasLists()) await apt.update();
  const folder = await cached("selection", selectionKey(), async (temporary) => {
    writeFileSync(join(temporary, FILE), JSON.stringify(await lookUp(apt)));
  });
  return read(folder);
}

/** What a look-up with the present lists has found, if there was one. */
export function knownSelection(): Selection | undefined {
  const folder = cachePath("selection", selectionKey());
  return existsSync(folder) ? read(folder) : undefined;
}

const FILE = "selection.json";
const selectionKey = () => digest(Apt.stamp(), readFileSync(import.meta.filename));
const read = (folder: string) => JSON.parse(readFileSync(join(folder, FILE), "utf8")) as Selection;

async function lookUp(apt: Apt): Promise<Selection> {
  await apt.ensureLists(KERNEL_META_PACKAGE);
  const image = (await apt.depends(KERNEL_META_PACKAGE)).find((name) => name.startsWith("linux-image-"));
  if (!image)
    throw new UserError(`${KERNEL_META_PACKAGE} depends on no kernel in this machine's apt sources`, 1);
  const kernelRelease = image.slice("linux-image-".length);
  const headers = `linux-headers-${kernelRelease}`;
  const [ofImage, ofHeaders, ofFio] = await Promise.all(
    [image, headers, "fio"].map((name) => apt.depends(name)),
  );
  const kernel = [
    image,
    ...ofImage!.filter((name) => /^linux-(binary|modules)-/.test(name)),
    headers,
    ...ofHeaders!.filter((name) => /^linux-(headers|kbuild)-/.test(name)),
  ];
  const userland = ["busybox-static", "fio", ...ofFio!.filter((name) => FIO_LIBRARIES.test(name))];
  const versions = await apt.versions([...kernel, ...userland]);
  const set = (names: string[]): PackageSet => {
    const missing = names.filter((name) => !versions.has(name));
    if (missing.length > 0)
      throw new UserError(`apt's lists name ${missing.join(", ")} but do not offer it`, 1);
    return { names, key: digest(...names.map((name) => `${name} ${versions.get(name)}`)) };
  };
  return { kernelRelease, kernel: set(kernel), userland: set(userland) };
}
