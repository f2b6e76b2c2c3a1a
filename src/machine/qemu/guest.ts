import { join } from "node:path";
import { Apt, DownloadFailed } from "./apt.ts";
import { withCacheLock } from "./cache.ts";
import { type Additions, ensureInitramfs } from "./initramfs.ts";
import { ensureKernel, type Kernel } from "./kernel.ts";
import { ensureModule, GUEST_SOURCES } from "./module.ts";
import { ensureHostTools, type Report } from "./packages.ts";
import { selectPackages } from "./selection.ts";
import { ensureUserland, type Userland } from "./userland.ts";

/** A guest that QEMU can boot. */
export interface Guest {
  kernel: string;
  initrd: string;
  kernelVersion: string;
  /** `modprobe` loads it in the guest; it is not loaded at boot. */
  moduleName: string;
}

/**
 * Find or install what a VM run needs, and build the guest unless the cache has it (then this takes milliseconds).
 * `report` hears what is done, and nothing when nothing is.
 */
export const ensureGuest = (report: Report, moduleSources = join(GUEST_SOURCES, "linux")): Promise<Guest> =>
  prepared(report, async (parts) => {
    const module = await ensureModule(parts.kernel, moduleSources, report);
    const nothingElse = { stockModules: [], key: "", files: async () => [] };
    const additions = { kind: "initramfs", modules: [module], ...nothingElse };
    return { ...(await packed(parts, additions, report)), moduleName: module.name };
  });

/** A guest with other things than our module. */
export const ensureGuestWith = (additions: Additions, report: Report): Promise<Omit<Guest, "moduleName">> =>
  prepared(report, (parts) => packed(parts, additions, report));

interface DebianParts {
  kernel: Kernel;
  userland: Userland;
}

async function prepared<T>(report: Report, build: (parts: DebianParts) => Promise<T>): Promise<T> {
  const waiting = () => report("waiting for another run, which is preparing a guest too");
  return await withCacheLock(waiting, async () => {
    await ensureHostTools(report);
    return await build(await ensureDebianParts(report));
  });
}

async function packed({ kernel, userland }: DebianParts, additions: Additions, report: Report) {
  const initrd = await ensureInitramfs(kernel, userland, additions, report);
  return { kernel: kernel.image, initrd, kernelVersion: kernel.release };
}

async function ensureDebianParts(report: Report): Promise<DebianParts> {
  const apt = new Apt(report);
  const attempt = async () => {
    const selection = await selectPackages(apt);
    return {
      kernel: await ensureKernel(selection, apt, report),
      userland: await ensureUserland(selection.userland, apt, report),
    };
  };
  try {
    return await attempt();
  } catch (error) {
    if (!(error instanceof DownloadFailed) || !(await apt.update())) throw error;
    return await attempt();
  }
}
