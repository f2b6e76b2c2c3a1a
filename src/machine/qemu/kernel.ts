import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { UserError } from "../../base/errors.ts";
import type { Apt } from "./apt.ts";
import { cached } from "./cache.ts";
import type { Report } from "./packages.ts";
import type { Selection } from "./selection.ts";

export interface Kernel {
  release: string;
  image: string;
  headers: string;
  modules: string;
  key: string;
}

export const kernelKey = ({ kernelRelease, kernel }: Selection): string => `${kernelRelease}-${kernel.key}`;

/** Debian's stock kernel with what is needed to build modules for it, unpacked into the cache; nothing is installed. */
export async function ensureKernel(selection: Selection, apt: Apt, report: Report): Promise<Kernel> {
  const { kernelRelease: release, kernel } = selection;
  const root = await cached("kernel", kernelKey(selection), async (temporary) => {
    report(`downloading Debian's kernel ${release} and its headers`);
    await apt.unpack(kernel.names, temporary);
    makeHeadersRelocatable(join(temporary, "usr/src", `linux-headers-${release}`, "Makefile"));
  });
  const found: Kernel = {
    release,
    image: join(root, "boot", `vmlinuz-${release}`),
    headers: join(root, "usr/src", `linux-headers-${release}`),
    modules:
      [join(root, "lib/modules", release), join(root, "usr/lib/modules", release)].find(existsSync) ?? "",
    key: kernel.key,
  };
  if (!existsSync(found.image) || found.modules === "")
    throw new UserError(
      `Debian's package of kernel ${release} has no kernel image or no modules: remove ${root}`,
      1,
    );
  return found;
}

/** The headers' Makefile includes another package's by absolute path, where it is not. */
function makeHeadersRelocatable(makefile: string): void {
  const here = "$(dir $(lastword $(MAKEFILE_LIST)))..";
  writeFileSync(makefile, readFileSync(makefile, "utf8").replaceAll("include /usr/src", `include ${here}`));
}
