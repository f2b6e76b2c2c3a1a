import { HostError } from "../../src/base/errors.ts";
import * as uapi from "../../src/wire/iommufd.ts";
import { FakeVfioKernel } from "./vfio-kernel.ts";

export const DEVICE_FILE = "/dev/vfio/devices/vfio3";

/** The same kernel with iommufd: Linux 6.12 drivers/iommu/iommufd/main.c and drivers/vfio/device_cdev.c. */
export class FakeIommufdKernel extends FakeVfioKernel {
  /** IDs of address spaces. */
  readonly spaces = new Set<number>();
  /** Files of functions that are bound, and the space that each is attached to. */
  readonly #attached = new Map<number, number | undefined>();
  #nextId = 1;

  constructor() {
    super();
    this.folders["/sys/bus/pci/devices/0000:00:06.0/vfio-dev"] = ["vfio3"];
  }

  override ioctl(fd: number, name: string, request: number, argument: number | Uint8Array): number {
    if (this.refused[name] !== undefined) throw new HostError(name, this.refused[name]);
    const path = this.files.get(fd);
    if (path === "/dev/iommu" && typeof argument !== "number") return this.#ofIommufd(request, argument);
    if (path !== DEVICE_FILE && !this.#attached.has(fd)) throw new HostError(name, "EBADF");
    if (typeof argument !== "number" && request === uapi.VFIO_DEVICE_BIND_IOMMUFD)
      return this.#bind(fd, argument);
    // "User is restricted from accessing the device before the binding operation is completed."
    if (!this.#attached.has(fd)) throw new HostError(name, "EINVAL");
    if (typeof argument !== "number" && request === uapi.VFIO_DEVICE_ATTACH_IOMMUFD_PT)
      return this.#attach(fd, argument);
    return super.ioctl(fd, name, request, argument);
  }

  override close(fd: number): void {
    super.close(fd);
    this.#attached.delete(fd);
  }

  #bind(fd: number, bytes: Uint8Array): number {
    const { argsz, flags, iommufd } = uapi.DeviceBind.read(bytes);
    if (argsz < uapi.DeviceBind.size || flags !== 0 || this.#attached.has(fd))
      throw new HostError("bind", "EINVAL");
    if (this.files.get(iommufd) !== "/dev/iommu") throw new HostError("bind", "EBADF");
    uapi.DeviceBind.write(bytes, { outDevid: this.#nextId++ });
    this.#attached.set(fd, undefined);
    // From now on it is what VFIO_GROUP_GET_DEVICE_FD would have given.
    this.files.set(fd, "device");
    return 0;
  }

  #attach(fd: number, bytes: Uint8Array): number {
    const { argsz, flags, ptId } = uapi.DeviceAttach.read(bytes);
    if (argsz < uapi.DeviceAttach.size || flags !== 0) throw new HostError("attach", "EINVAL");
    if (!this.spaces.has(ptId)) throw new HostError("attach", "ENOENT");
    this.#attached.set(fd, ptId);
    return 0;
  }

  #ofIommufd(request: number, bytes: Uint8Array): number {
    if (request === uapi.IOMMU_IOAS_ALLOC) {
      this.spaces.add(this.#nextId);
      uapi.IoasAlloc.write(bytes, { outIoasId: this.#nextId++ });
    } else if (request === uapi.IOMMU_DESTROY) {
      const { id } = uapi.IommuDestroy.read(bytes);
      if ([...this.#attached.values()].includes(id)) throw new HostError("destroy", "EBUSY");
      if (!this.spaces.delete(id)) throw new HostError("destroy", "ENOENT");
      this.log.push("destroy");
    } else throw new HostError("ioctl", "ENOTTY");
    return 0;
  }
}
