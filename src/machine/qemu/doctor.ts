import { existsSync } from "node:fs";
import { probeKvm } from "./accel.ts";
import { Apt } from "./apt.ts";
import { cachePath } from "./cache.ts";
import { command, which } from "./command.ts";
import { kernelKey } from "./kernel.ts";
import { HOST_TOOLS, type HostTool, installCommand, locate, missingPackages } from "./packages.ts";
import { knownSelection } from "./selection.ts";
import { userlandKey } from "./userland.ts";

export interface Check {
  name: string;
  ok: boolean;
  detail: string;
  /** What to type or do; null when there is nothing to. */
  fix: string | null;
  /** Coiommu does without it. */
  optional?: true;
}

/** What a VM run needs, found out within a second and without installing or downloading anything. */
export async function diagnose(): Promise<Check[]> {
  const tools = Promise.all(HOST_TOOLS.map(checkTool));
  return [...(await tools), ...checkGuestParts(), await checkKvm()];
}

/** Why no VM can be run here, not even after the set-up that a run does by itself; undefined when one can. */
export function vmUnavailable(): string | undefined {
  const missing = missingPackages();
  if (missing.length > 0 && !which("apt-get")) return `${missing.join(", ")} are not on this machine`;
  if (missing.length > 0 && process.getuid?.() !== 0)
    return `a VM needs ${missing.join(", ")}: type \`${installCommand(missing)}\``;
  const absent = checkGuestParts().find((part) => !part.ok);
  return absent && `the ${absent.name} ${absent.detail}, and this machine has no apt-get`;
}

async function checkTool(tool: HostTool): Promise<Check> {
  const path = locate(tool);
  if (!path)
    return {
      name: tool.package,
      ok: false,
      detail: `missing; ${tool.purpose}`,
      fix: installCommand([tool.package]),
    };
  const version = tool.program ? await command([path, "--version"]) : undefined;
  return { name: tool.package, ok: true, detail: version?.stdout.split("\n")[0] || path, fix: null };
}

/** What runs inside the guest: in the cache, or fetched there by the first run. */
function checkGuestParts(): Check[] {
  const selection = knownSelection();
  const release = selection?.kernelRelease;
  const kernel = selection && existsSync(cachePath("kernel", kernelKey(selection)));
  const userland = selection && existsSync(cachePath("userland", userlandKey(selection.userland)));
  return [
    guestPart("guest kernel", kernel ? `${release}, in the cache` : undefined),
    guestPart("kernel headers", kernel ? `${release}, in the cache` : undefined),
    guestPart("guest busybox", userland ? "in the cache" : undefined),
    guestPart("guest fio", userland ? "in the cache" : undefined),
  ];
}

function guestPart(name: string, found: string | undefined): Check {
  if (found) return { name, ok: true, detail: found, fix: null };
  if (!which("apt-get") || !which("dpkg"))
    return {
      name,
      ok: false,
      detail: "comes from Debian's packages",
      fix: "use a machine with apt-get and dpkg",
    };
  const lists = Apt.hasLists() ? "" : ", after a list of packages";
  return { name, ok: true, detail: `not in the cache; the first run downloads it${lists}`, fix: null };
}

/** Never required: without it the guest is emulated, which is slower. */
async function checkKvm(): Promise<Check> {
  const qemu = which("qemu-system-x86_64");
  if (!qemu) return { name: "KVM", ok: existsSync("/dev/kvm"), detail: "not tried without QEMU", fix: null };
  const { accel, reason } = await probeKvm(qemu);
  const ok = accel === "kvm";
  const detail = ok ? reason : `${reason}; guests are emulated (--accel tcg), which is slower`;
  return { name: "KVM", ok, detail, fix: null };
}
