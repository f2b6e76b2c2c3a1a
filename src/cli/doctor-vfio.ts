/** What `coiommu doctor` says of real IOMMUs: VFIO's containers, iommufd, and the functions that are given to them. */
import fs from "node:fs";
import { basename } from "node:path";
import type { Check } from "../machine/qemu/doctor.ts";

/** A machine's /dev, /proc and /sys. */
export interface Files {
  /** Names in a folder; none when there is none. */
  list(path: string): readonly string[];
  /** Name of what a link leads to. */
  link(path: string): string | undefined;
  /** Its text without the last newline. */
  text(path: string): string | undefined;
  exists(path: string): boolean;
  /** Whether this user may read and write it. */
  usable(path: string): boolean;
}

const orUndefined = <T>(get: () => T): T | undefined => {
  try {
    return get();
  } catch {
    return undefined;
  }
};

export const filesHere: Files = {
  list: (path) => orUndefined(() => fs.readdirSync(path)) ?? [],
  link: (path) => orUndefined(() => basename(fs.readlinkSync(path))),
  text: (path) => orUndefined(() => fs.readFileSync(path, "latin1").trim()),
  exists: (path) => fs.existsSync(path),
  usable(path) {
    try {
      fs.accessSync(path, fs.constants.R_OK | fs.constants.W_OK);
      return true;
    } catch {
      return false;
    }
  },
};

const DRIVER = "/sys/bus/pci/drivers/vfio-pci";
const FUNCTIONS = "/sys/bus/pci/devices";
const ENTRY_LIMIT = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";

/** None is a reason to fail: what is missing stops `--device` only. */
export function vfioChecks(files: Files = filesHere): Check[] {
  const bound = files.list(DRIVER).filter((name) => /^[0-9a-f]{4,}:/.test(name));
  return [iommu(files), vfio(files, bound), iommufd(files, bound)].map((check) => ({
    ...check,
    ...(!check.ok && { optional: true }),
  }));
}

const missing = (name: string, detail: string, fix: string): Check => ({ name, ok: false, detail, fix });

function iommu(files: Files): Check {
  const groups = files.list("/sys/kernel/iommu_groups").length;
  if (groups > 0)
    return { name: "IOMMU", ok: true, detail: `${groups} groups of PCI functions and others`, fix: null };
  const fix = "switch VT-d or AMD-Vi on in the firmware, and boot with intel_iommu=on or amd_iommu=on";
  return missing("IOMMU", "none is in use: no function of this machine can be given to coiommu", fix);
}

function vfio(files: Files, bound: readonly string[]): Check {
  if (bound.length === 0) return missing("VFIO", "no function is bound to vfio-pci", bindFix(files));
  const groups = new Map(bound.map((bdf) => [bdf, files.link(`${FUNCTIONS}/${bdf}/iommu_group`)]));
  const functions = [...groups].map(([bdf, group]) => `${bdf} (group ${group ?? "none"})`).join(", ");
  if (!files.exists("/dev/vfio/vfio"))
    return missing("VFIO", `${functions}, but there is no /dev/vfio/vfio`, "modprobe vfio_iommu_type1");
  const refused = [...new Set(groups.values())]
    .map((group) => `/dev/vfio/${group}`)
    .filter((path) => !files.usable(path));
  if (refused.length > 0)
    return missing(
      "VFIO",
      `${functions}, but this user may not use ${refused.join(", ")}`,
      `sudo chown $USER ${refused.join(" ")}, or run as root`,
    );
  const limit = files.text(ENTRY_LIMIT);
  const mappings = limit === undefined ? "" : `; ${limit} mappings for each container (dma_entry_limit)`;
  return { name: "VFIO", ok: true, detail: `${functions}${mappings}`, fix: null };
}

function bindFix(files: Files): string {
  const driver = files.exists(DRIVER) ? "" : "modprobe vfio-pci; ";
  return `${driver}echo vfio-pci >${FUNCTIONS}/BDF/driver_override; echo BDF >${FUNCTIONS}/BDF/driver/unbind; echo BDF >/sys/bus/pci/drivers_probe`;
}

/** An own file of each function is what iommufd needs of VFIO. */
function iommufd(files: Files, bound: readonly string[]): Check {
  const kernel =
    "use Linux 6.6 or later with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV; VFIO's containers do as well";
  if (!files.exists("/dev/iommu"))
    return missing("iommufd", "this kernel has no /dev/iommu", `modprobe iommufd, or ${kernel}`);
  if (bound.length === 0)
    return { name: "iommufd", ok: true, detail: "/dev/iommu; no function is bound to vfio-pci", fix: null };
  const own = bound.flatMap((bdf) => files.list(`${FUNCTIONS}/${bdf}/vfio-dev`));
  if (own.length === 0) return missing("iommufd", "VFIO has no files of single functions", kernel);
  const refused = ["/dev/iommu", ...own.map((name) => `/dev/vfio/devices/${name}`)].filter(
    (path) => !files.usable(path),
  );
  if (refused.length > 0)
    return missing(
      "iommufd",
      `this user may not use ${refused.join(", ")}`,
      `sudo chown $USER ${refused.join(" ")}, or run as root`,
    );
  return { name: "iommufd", ok: true, detail: `/dev/iommu, ${own.join(", ")}`, fix: null };
}
