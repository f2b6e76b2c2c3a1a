import { HostError, UserError } from "../base/errors.ts";
import {
  DeviceAttach,
  DeviceBind,
  IOMMU_DESTROY,
  IOMMU_IOAS_ALLOC,
  IoasAlloc,
  IommuDestroy,
  VFIO_DEVICE_ATTACH_IOMMUFD_PT,
  VFIO_DEVICE_BIND_IOMMUFD,
} from "../wire/iommufd.ts";
import { checked, FUNCTIONS, groupOf, isForbidden, opened, type Refusal } from "./vfio-device.ts";
import { VfioFunction } from "./vfio-function.ts";
import { linux, type VfioKernel } from "./vfio-kernel.ts";

const IOMMUFD = "/dev/iommu";
const UNSAFE = "/sys/module/iommufd/parameters/allow_unsafe_interrupts";
/** Why a kernel may have none of what this needs. */
const NEEDS = "Linux 6.6 or later with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV is needed";

/** The function's own file, for which VFIO needs no group; undefined where there is none. */
const fileOf = (bdf: string, kernel: VfioKernel): string | undefined => {
  const [name] = kernel.list(`${FUNCTIONS}/${bdf}/vfio-dev`);
  return name && `/dev/vfio/devices/${name}`;
};

/** What `--pinner auto` pins with for this function: iommufd where this process may use it, else VFIO's container. */
export function pinnerFor(bdf: string, kernel: VfioKernel = linux): "iommufd" | "vfio" {
  const file = fileOf(bdf, kernel);
  if (file === undefined) return "vfio";
  try {
    for (const path of [IOMMUFD, file]) kernel.close(kernel.open(path));
    return "iommufd";
  } catch (error) {
    if (!(error instanceof HostError)) throw error;
    return "vfio";
  }
}

/**
 * A PCI function of this machine for this process, with an I/O address space of its own (iommufd): what is mapped there is
 * all that the function can reach. Linux, Documentation/userspace-api/iommufd.rst and driver-api/vfio.rst.
 */
export class IommufdDevice {
  readonly function: VfioFunction;
  /** fd and ID: valid in every thread, and for IommufdPinner. */
  readonly iommufd: number;
  readonly ioas: number;
  readonly #kernel: VfioKernel;
  #open = true;

  /**
   * `bdf` as in "0000:00:06.0". Throws UserError, with what to do, where the function cannot be had, and HostError.
   * Nothing is left open then.
   */
  static open(bdf: string, kernel: VfioKernel = linux): IommufdDevice {
    const refusal: Refusal = (what) => new UserError(`${bdf}: ${what}`, 1);
    groupOf(bdf, kernel, refusal);
    const iommufd = opened(kernel, IOMMUFD, (errno) =>
      isForbidden(errno)
        ? refusal(notAllowed(IOMMUFD))
        : refusal(`iommufd cannot be used: ${IOMMUFD}: ${errno}; ${NEEDS}, or --pinner vfio`),
    );
    try {
      const ioas = allocate(iommufd, kernel);
      const device = openFile(bdf, kernel, refusal);
      checked(device, kernel, () => attach(device, iommufd, ioas, kernel, refusal));
      return new IommufdDevice(new VfioFunction(bdf, device, kernel), iommufd, ioas, kernel);
    } catch (error) {
      kernel.close(iommufd);
      throw error;
    }
  }

  private constructor(own: VfioFunction, iommufd: number, ioas: number, kernel: VfioKernel) {
    this.function = own;
    this.iommufd = iommufd;
    this.ioas = ioas;
    this.#kernel = kernel;
  }

  /** The function first, which ends its DMA and detaches it, then the address space with every mapping. Idempotent. */
  close(): void {
    if (!this.#open) return;
    this.#open = false;
    try {
      this.function.close();
      const space = IommuDestroy.encode({ size: IommuDestroy.size, id: this.ioas });
      this.#kernel.ioctl(this.iommufd, "IOMMU_DESTROY", IOMMU_DESTROY, space);
    } finally {
      this.#kernel.close(this.iommufd);
    }
  }
}

const notAllowed = (path: string) =>
  `this user may not use ${path}; sudo chown $USER ${path}, or run as root`;

function allocate(iommufd: number, kernel: VfioKernel): number {
  const space = IoasAlloc.encode({ size: IoasAlloc.size });
  kernel.ioctl(iommufd, "IOMMU_IOAS_ALLOC", IOMMU_IOAS_ALLOC, space);
  return IoasAlloc.read(space).outIoasId;
}

function openFile(bdf: string, kernel: VfioKernel, refusal: Refusal): number {
  const path = fileOf(bdf, kernel);
  if (path === undefined) throw refusal(`VFIO has no file of its own for it; ${NEEDS}, or --pinner vfio`);
  return opened(kernel, path, (errno) =>
    isForbidden(errno)
      ? refusal(notAllowed(path))
      : refusal(`VFIO does not give it to this process: ${path}: ${errno}`),
  );
}

function attach(device: number, iommufd: number, ioas: number, kernel: VfioKernel, refusal: Refusal): void {
  const bind = DeviceBind.encode({ argsz: DeviceBind.size, iommufd });
  try {
    kernel.ioctl(device, "VFIO_DEVICE_BIND_IOMMUFD", VFIO_DEVICE_BIND_IOMMUFD, bind);
  } catch (error) {
    if (!(error instanceof HostError)) throw error;
    if (error.errno === "EPERM")
      throw refusal(
        "its IOMMU does not remap interrupts, so that it could forge them; switch interrupt remapping on in the firmware " +
          `or, if you trust the function, as root: echo 1 >${UNSAFE}`,
      );
    if (error.errno === "EBUSY")
      throw refusal(
        "another process has it, or a function that shares its IOMMU group has a driver; " +
          "end that, or as root: echo BDF >/sys/bus/pci/devices/BDF/driver/unbind",
      );
    throw error;
  }
  const attached = DeviceAttach.encode({ argsz: DeviceAttach.size, ptId: ioas });
  kernel.ioctl(device, "VFIO_DEVICE_ATTACH_IOMMUFD_PT", VFIO_DEVICE_ATTACH_IOMMUFD_PT, attached);
}
