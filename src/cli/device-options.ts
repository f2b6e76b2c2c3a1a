import type { Command } from "commander";
import { UserError } from "../base/errors.ts";
import { type Bdf, formatBdf, parseBdf } from "../base/units.ts";
import { isRemapping, type Strategy } from "../control/strategy.ts";
import { writes } from "../machine/workload-text.ts";
import type { AddOption, MachineOptions } from "./machine-options.ts";

/** A real disk for an embedded guest. */
export function addDeviceOptions(command: Command, option: AddOption): void {
  option(
    "--device <bdf>",
    "the guest's disk is this NVMe function of this machine, bound to vfio-pci: 0000:01:00.0 (embedded; fio only reads it)",
    parseDevice,
  );
  command.option(
    "--overwrite-device",
    "fio may write to it: what is in the region that fio uses, from its first block on, is lost",
    false,
  );
}

function parseDevice(text: string): Bdf {
  const bdf = parseBdf(text);
  if (bdf === undefined)
    throw new UserError(`--device "${text}": give a PCI function of this machine, such as 0000:01:00.0`);
  return bdf;
}

/** Throws UserError for options that do not go with a real disk, or only with one. */
export function checkDevice(options: MachineOptions, strategies: readonly Strategy[]): void {
  const { device, pinner, workload, disk, faultCapable, overwriteDevice } = options;
  checkPinner(pinner, device);
  if (device === undefined) {
    if (overwriteDevice) throw new UserError("--overwrite-device: there is no --device");
    return;
  }
  const name = formatBdf(device);
  const wrong = (what: string) => new UserError(`--device ${name}: ${what}`);
  const remapping = strategies.find(isRemapping);
  if (strategies.includes("none"))
    throw wrong("strategy none pins nothing, and its IOMMU lets it reach what is pinned only");
  if (remapping !== undefined)
    throw wrong(
      `strategy ${remapping} gives it addresses of a domain of ours, and it has guest physical ones`,
    );
  if (disk !== undefined) throw wrong("--disk is another one for the same guest");
  if (faultCapable) throw wrong("it is not --fault-capable: VFIO lets no function fault on guest memory");
  if (workload && workload.name !== "fio" && workload.name !== "idle")
    throw wrong(`--workload ${workload.text} has no use for a disk`);
  if (workload?.name === "fio" && writes(workload.fio) && !overwriteDevice)
    throw wrong(
      `--workload ${workload.text} writes, and what is on it would be lost; say --overwrite-device if it may be`,
    );
}

/** Throws UserError for a pinner that cannot pin for what the guest uses. */
export function checkPinner(pinner: MachineOptions["pinner"], device: Bdf | undefined): void {
  const ofDevice = pinner === "vfio" || pinner === "iommufd";
  if (ofDevice && device === undefined)
    throw new UserError(
      `--pinner ${pinner}: pins by mapping memory for a function of this machine; name one with --device`,
    );
  if (!ofDevice && pinner !== "auto" && device !== undefined)
    throw new UserError(
      `--pinner ${pinner}: the IOMMU of --device ${formatBdf(device)} lets it reach what vfio or iommufd pins only`,
    );
}
