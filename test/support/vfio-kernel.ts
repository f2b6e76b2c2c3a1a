import { HostError } from "../../src/base/errors.ts";
import type { VfioKernel } from "../../src/host/vfio-kernel.ts";
import { PCI_COMMAND_MASTER, PciHeader } from "../../src/wire/pci.ts";
import * as vfio from "../../src/wire/vfio.ts";

const GIB = 2 ** 30;
const CONFIG = 7 * 2 ** 40;

/** A kernel with VFIO and one function, 0000:00:06.0 in group 2: as Linux 6.1 answers, as far as VfioDevice asks. */
export class FakeVfioKernel implements VfioKernel {
  links: Record<string, string | undefined> = {
    "/sys/bus/pci/devices/0000:00:06.0/iommu_group": "2",
    "/sys/bus/pci/devices/0000:00:06.0/driver": "vfio-pci",
  };
  folders: Record<string, string[]> = {
    "/sys/bus/pci/devices": ["0000:00:05.0", "0000:00:06.0"],
    "/sys/kernel/iommu_groups/2/devices": ["0000:00:06.0"],
  };
  version = 0;
  extensions: readonly number[] = [1, vfio.VFIO_TYPE1v2_IOMMU];
  viable = true;
  isPci = true;
  resets = true;
  barFlags = 15;
  /** Errno of what is refused: a path, or a call. */
  refused: Record<string, string> = {};
  readonly config = PciHeader.encode({ command: 0x103, baseClass: 1, subclass: 8, progIf: 2 });
  /** What is open, by fd; and the order of what matters. */
  readonly files = new Map<number, string>();
  readonly mapped = new Set<number>();
  readonly log: string[] = [];
  #next = 10;
  #container: number | undefined;

  get mastering(): boolean {
    return (PciHeader.read(this.config).command & PCI_COMMAND_MASTER) !== 0;
  }

  texts: Record<string, string> = {
    "/sys/bus/pci/devices/0000:00:06.0/iommu_group/reserved_regions":
      "0x0000000000000000 0x0000000000ffffff direct-relaxable\n0x00000000fee00000 0x00000000feefffff msi\n",
  };
  text = (path: string) => this.texts[path];
  link = (path: string) => this.links[path];
  list = (path: string) => this.folders[path] ?? [];

  open(path: string): number {
    this.#call("open", path);
    return this.#opened(path);
  }

  close(fd: number): void {
    this.log.push(`close ${this.#file(fd)}`);
    this.files.delete(fd);
  }

  ioctl(fd: number, name: string, request: number, argument: number | Uint8Array): number {
    const file = this.#file(fd);
    this.#call("ioctl", name);
    if (typeof argument !== "number") return this.#withStructure(file, request, argument);
    if (file === "device" && request === vfio.VFIO_DEVICE_RESET && this.resets) return this.#reset();
    if (file === "/dev/vfio/vfio" && request === vfio.VFIO_GET_API_VERSION) return this.version;
    if (file === "/dev/vfio/vfio" && request === vfio.VFIO_CHECK_EXTENSION)
      return Number(this.extensions.includes(argument));
    if (file === "/dev/vfio/vfio" && request === vfio.VFIO_SET_IOMMU && this.#container === fd) return 0;
    throw new HostError(name, "EINVAL");
  }

  read(fd: number, into: Uint8Array, offset: number): void {
    if (this.#file(fd) !== "device" || offset !== CONFIG) throw new HostError("pread", "EINVAL");
    into.set(this.config.subarray(0, into.length));
  }

  write(fd: number, from: Uint8Array, offset: number): void {
    if (this.#file(fd) !== "device" || offset < CONFIG) throw new HostError("pwrite", "EINVAL");
    const before = this.mastering;
    this.config.set(from, offset - CONFIG);
    if (this.mastering !== before) this.log.push(this.mastering ? "master on" : "master off");
  }

  map(fd: number, size: number, offset: number): number {
    if (this.#file(fd) !== "device" || size !== 16_384 || offset !== 0) throw new HostError("mmap", "EINVAL");
    this.mapped.add(GIB);
    return GIB;
  }

  unmap(address: number): void {
    if (!this.mapped.delete(address)) throw new HostError("munmap", "EINVAL");
    this.log.push("unmap");
  }

  #withStructure(file: string, request: number, bytes: Uint8Array): number {
    if (file === "/dev/vfio/2") return this.#ofGroup(request, bytes);
    if (file !== "device" || new DataView(bytes.buffer).getUint32(0, true) !== bytes.length)
      throw new HostError("ioctl", "EINVAL");
    if (request === vfio.VFIO_DEVICE_GET_INFO) {
      const flags = Number(this.resets) | (this.isPci ? vfio.VFIO_DEVICE_FLAGS_PCI : 4);
      vfio.VfioDeviceInfo.write(bytes, { flags, regions: 9, irqs: 5 });
    } else if (request === vfio.VFIO_DEVICE_GET_REGION_INFO) {
      const { index } = vfio.VfioRegionInfo.read(bytes);
      if (index === 0) vfio.VfioRegionInfo.write(bytes, { flags: this.barFlags, size: 16_384, offset: 0 });
      if (index === 7) vfio.VfioRegionInfo.write(bytes, { flags: 3, size: 4096, offset: CONFIG });
    } else throw new HostError("ioctl", "ENOTTY");
    return 0;
  }

  #ofGroup(request: number, bytes: Uint8Array): number {
    if (request === vfio.VFIO_GROUP_GET_STATUS) {
      vfio.VfioGroupStatus.write(bytes, { flags: Number(this.viable) });
      return 0;
    }
    if (request === vfio.VFIO_GROUP_SET_CONTAINER) {
      this.#container = vfio.VfioFd.read(bytes).fd;
      return 0;
    }
    const name = Buffer.from(bytes).toString();
    if (request !== vfio.VFIO_GROUP_GET_DEVICE_FD || name !== "0000:00:06.0\0" || !this.#container)
      throw new HostError("ioctl", "EINVAL");
    return this.#opened("device");
  }

  #reset(): number {
    this.log.push("reset");
    return 0;
  }

  #opened(path: string): number {
    this.files.set(this.#next, path);
    return this.#next++;
  }

  #file(fd: number): string {
    const file = this.files.get(fd);
    if (file === undefined) throw new HostError("ioctl", "EBADF");
    return file;
  }

  #call(syscall: string, what: string): void {
    const errno = this.refused[what];
    if (errno !== undefined) throw new HostError(syscall, errno, what);
  }
}
