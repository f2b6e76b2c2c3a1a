import { HostError, UserError } from "../base/errors.ts";
import {
  VFIO_API_VERSION,
  VFIO_CHECK_EXTENSION,
  VFIO_GET_API_VERSION,
  VFIO_GROUP_FLAGS_VIABLE,
  VFIO_GROUP_GET_DEVICE_FD,
  VFIO_GROUP_GET_STATUS,
  VFIO_GROUP_SET_CONTAINER,
  VFIO_SET_IOMMU,
  VFIO_TYPE1v2_IOMMU,
  VfioFd,
  VfioGroupStatus,
} from "../wire/vfio.ts";
import { VfioFunction } from "./vfio-function.ts";
import { linux, type VfioKernel } from "./vfio-kernel.ts";

export const FUNCTIONS = "/sys/bus/pci/devices";
const CONTAINER = "/dev/vfio/vfio";

/** What makes the kernel give `bdf` to VFIO, to be typed by root. */
const bindCommands = (bdf: string, driver: string | undefined): string =>
  [
    "modprobe vfio-pci",
    `echo vfio-pci >${FUNCTIONS}/${bdf}/driver_override`,
    ...(driver === undefined ? [] : [`echo ${bdf} >${FUNCTIONS}/${bdf}/driver/unbind`]),
    `echo ${bdf} >/sys/bus/pci/drivers_probe`,
  ].join("; ");

const UNSAFE = "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts";

/** A mistake of the person who gave this function, in one sentence. */
export type Refusal = (what: string) => UserError;

/**
 * A PCI function of this machine for this process, with a container of its own (VFIO type 1): what is mapped there is
 * all that the function can reach. Linux, Documentation/driver-api/vfio.rst.
 */
export class VfioDevice {
  readonly function: VfioFunction;
  /** Its fd: valid in every thread, and for VfioPinner. */
  readonly container: number;
  readonly #group: number;
  readonly #kernel: VfioKernel;
  #open = true;

  /**
   * `bdf` as in "0000:00:06.0". Throws UserError, with what to do, where the function cannot be had. Nothing is left
   * open then.
   */
  static open(bdf: string, kernel: VfioKernel = linux): VfioDevice {
    const refusal: Refusal = (what) => new UserError(`${bdf}: ${what}`, 1);
    const group = groupOf(bdf, kernel, refusal);
    const opened: number[] = [];
    const keep = (fd: number) => {
      opened.unshift(fd);
      return fd;
    };
    try {
      const container = keep(openContainer(kernel, refusal));
      const groupFd = keep(openGroup(bdf, group, kernel, refusal));
      attach(container, groupFd, kernel, refusal);
      const name = new TextEncoder().encode(`${bdf}\0`);
      const fd = kernel.ioctl(groupFd, "VFIO_GROUP_GET_DEVICE_FD", VFIO_GROUP_GET_DEVICE_FD, name);
      return new VfioDevice(new VfioFunction(bdf, fd, kernel), container, groupFd, kernel);
    } catch (error) {
      for (const fd of opened) kernel.close(fd);
      throw error;
    }
  }

  private constructor(own: VfioFunction, container: number, group: number, kernel: VfioKernel) {
    this.function = own;
    this.container = container;
    this.#group = group;
    this.#kernel = kernel;
  }

  /** The function first, so that its DMA has ended before the container, and with it every mapping, goes. Idempotent. */
  close(): void {
    if (!this.#open) return;
    this.#open = false;
    try {
      this.function.close();
    } finally {
      this.#kernel.close(this.#group);
      this.#kernel.close(this.container);
    }
  }
}

export const isForbidden = (errno: string): boolean => errno === "EACCES" || errno === "EPERM";

/** Number of the function's group, as text, once all that does not need VFIO is as it must be. */
export function groupOf(bdf: string, kernel: VfioKernel, refusal: Refusal): string {
  const at = `${FUNCTIONS}/${bdf}`;
  if (!kernel.list(FUNCTIONS).includes(bdf))
    throw refusal("this machine has no such PCI function; `lspci -D` lists those that it has");
  const group = kernel.link(`${at}/iommu_group`);
  if (group === undefined)
    throw refusal(
      "no IOMMU stands before it; switch the IOMMU on in the firmware (VT-d, AMD-Vi) and boot with intel_iommu=on or amd_iommu=on",
    );
  const driver = kernel.link(`${at}/driver`);
  if (driver !== "vfio-pci")
    throw refusal(
      `it is bound to ${driver ?? "no driver"}, not to vfio-pci; as root: ${bindCommands(bdf, driver)}`,
    );
  return group;
}

function openContainer(kernel: VfioKernel, refusal: Refusal): number {
  const fd = opened(kernel, CONTAINER, (errno) =>
    refusal(`VFIO cannot be used: ${CONTAINER}: ${errno}; as root: modprobe vfio_iommu_type1`),
  );
  return checked(fd, kernel, () => {
    const version = kernel.ioctl(fd, "VFIO_GET_API_VERSION", VFIO_GET_API_VERSION, 0);
    if (version !== VFIO_API_VERSION)
      throw refusal(
        `this kernel's VFIO has version ${version}, and only version ${VFIO_API_VERSION} is known here`,
      );
    if (kernel.ioctl(fd, "VFIO_CHECK_EXTENSION", VFIO_CHECK_EXTENSION, VFIO_TYPE1v2_IOMMU) !== 1)
      throw refusal(
        "this kernel's VFIO has no IOMMU of type 1 (version 2); as root: modprobe vfio_iommu_type1",
      );
  });
}

function openGroup(bdf: string, group: string, kernel: VfioKernel, refusal: Refusal): number {
  const path = `/dev/vfio/${group}`;
  const fd = opened(kernel, path, (errno) => {
    if (isForbidden(errno))
      return refusal(`this user may not use it; sudo chown $USER ${path}, or run as root`);
    if (errno === "EBUSY") return refusal(`another process has it, or its group ${group}; end that first`);
    return refusal(`VFIO has no IOMMU for it: ${path}: ${errno}`);
  });
  return checked(fd, kernel, () => {
    const status = VfioGroupStatus.encode({ argsz: VfioGroupStatus.size });
    kernel.ioctl(fd, "VFIO_GROUP_GET_STATUS", VFIO_GROUP_GET_STATUS, status);
    if (VfioGroupStatus.read(status).flags & VFIO_GROUP_FLAGS_VIABLE) return;
    const others = othersIn(bdf, group, kernel);
    throw refusal(
      `its IOMMU group ${group} is shared with ${others}, which must be bound to vfio-pci or to nothing; ` +
        "as root: echo BDF >/sys/bus/pci/devices/BDF/driver/unbind",
    );
  });
}

/** As "0000:00:07.0 (e1000e)". */
function othersIn(bdf: string, group: string, kernel: VfioKernel): string {
  const named = kernel
    .list(`/sys/kernel/iommu_groups/${group}/devices`)
    .filter((other) => other !== bdf)
    .map((other) => ({ other, driver: kernel.link(`${FUNCTIONS}/${other}/driver`) }))
    .filter(({ driver }) => driver !== undefined && driver !== "vfio-pci");
  return named.map(({ other, driver }) => `${other} (${driver})`).join(", ") || "functions of other drivers";
}

function attach(container: number, group: number, kernel: VfioKernel, refusal: Refusal): void {
  const argument = VfioFd.encode({ fd: container });
  kernel.ioctl(group, "VFIO_GROUP_SET_CONTAINER", VFIO_GROUP_SET_CONTAINER, argument);
  try {
    kernel.ioctl(container, "VFIO_SET_IOMMU", VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU);
  } catch (error) {
    if (!(error instanceof HostError) || error.errno !== "EPERM") throw error;
    throw refusal(
      "its IOMMU does not remap interrupts, so that it could forge them; switch interrupt remapping on in the firmware " +
        `or, if you trust the function, as root: echo 1 >${UNSAFE}`,
    );
  }
}

export function opened(kernel: VfioKernel, path: string, refusal: (errno: string) => UserError): number {
  try {
    return kernel.open(path);
  } catch (error) {
    if (!(error instanceof HostError)) throw error;
    throw refusal(error.errno);
  }
}

/** `fd`, or closed when `check` throws. */
export function checked(fd: number, kernel: VfioKernel, check: () => void): number {
  try {
    check();
    return fd;
  } catch (error) {
    kernel.close(fd);
    throw error;
  }
}

/**
 * Addresses that no memory can be mapped at for the function, from `start` to before `end`. Linux,
 * Documentation/ABI/testing/sysfs-kernel-iommu_groups; VFIO maps over those of type direct-relaxable.
 */
export function reservedRanges(bdf: string, kernel: VfioKernel): { start: number; end: number }[] {
  const text = kernel.text(`${FUNCTIONS}/${bdf}/iommu_group/reserved_regions`) ?? "";
  return text
    .split("\n")
    .map((line) => line.split(" "))
    .filter(([start, end, type]) => start && end && type !== "direct-relaxable")
    .map(([start, end]) => ({ start: Number(start), end: Number(end) + 1 }));
}
