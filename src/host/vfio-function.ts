import { UserError } from "../base/errors.ts";
import { PCI_COMMAND_INTX_DISABLE, PCI_COMMAND_MASTER, PCI_COMMAND_MEMORY, PciHeader } from "../wire/pci.ts";
import {
  VFIO_DEVICE_FLAGS_PCI,
  VFIO_DEVICE_FLAGS_RESET,
  VFIO_DEVICE_GET_INFO,
  VFIO_DEVICE_GET_REGION_INFO,
  VFIO_DEVICE_RESET,
  VFIO_PCI_CONFIG_REGION_INDEX,
  VFIO_REGION_INFO_FLAG_MMAP,
  VfioDeviceInfo,
  VfioRegionInfo,
} from "../wire/vfio.ts";
import type { VfioKernel } from "./vfio-kernel.ts";

/** Memory of this process that leads to a BAR; any thread may use it while the function is open. */
export interface MappedBar {
  readonly address: number;
  readonly size: number;
}

/**
 * A PCI function that VFIO has given to this process, by whichever way: its configuration space, its BARs, its reset.
 * It decodes memory accesses as long as it is open, and does DMA only between startDma() and stopDma(). It interrupts
 * nobody: it is polled. All methods throw HostError.
 */
export class VfioFunction {
  /** As in "0000:00:06.0". */
  readonly name: string;
  readonly #fd: number;
  readonly #kernel: VfioKernel;
  readonly #canReset: boolean;
  /** Of the configuration space, in the device's file. */
  readonly #config: number;
  readonly #bars: MappedBar[] = [];
  #open = true;
  #dma = false;

  /** Takes over `fd`, also when it throws: UserError for what is no PCI function, HostError. */
  constructor(name: string, fd: number, kernel: VfioKernel) {
    this.name = name;
    this.#fd = fd;
    this.#kernel = kernel;
    try {
      const info = VfioDeviceInfo.encode({ argsz: VfioDeviceInfo.size });
      kernel.ioctl(fd, "VFIO_DEVICE_GET_INFO", VFIO_DEVICE_GET_INFO, info);
      const { flags } = VfioDeviceInfo.read(info);
      if (!(flags & VFIO_DEVICE_FLAGS_PCI)) throw new UserError(`${name}: this is no PCI function`);
      this.#canReset = (flags & VFIO_DEVICE_FLAGS_RESET) !== 0;
      this.#config = this.#region(VFIO_PCI_CONFIG_REGION_INDEX).offset;
      this.#setCommand(PCI_COMMAND_MEMORY | PCI_COMMAND_INTX_DISABLE, PCI_COMMAND_MASTER);
    } catch (error) {
      kernel.close(fd);
      throw error;
    }
  }

  /** Base class, subclass and programming interface: 24 bits. */
  get classCode(): number {
    const { baseClass, subclass, progIf } = this.#header();
    return (baseClass << 16) | (subclass << 8) | progIf;
  }

  /** Throws UserError where it is not there, or cannot be mapped. */
  mapBar(index: number): MappedBar {
    const { flags, size, offset } = this.#region(index);
    if (size === 0 || !(flags & VFIO_REGION_INFO_FLAG_MMAP))
      throw new UserError(`${this.name}: VFIO does not let its BAR ${index} be mapped`, 1);
    const bar = { address: this.#kernel.map(this.#fd, size, offset), size };
    this.#bars.push(bar);
    return bar;
  }

  /** From now on it may reach what the IOMMU maps. */
  startDma(): void {
    this.#dma = true;
    this.#setCommand(PCI_COMMAND_MASTER, 0);
  }

  /**
   * When it returns, the function reaches no memory any more, and has forgotten its queues. Comes before any pin of
   * memory that it was told of is released. Idempotent. A reset that is refused is a HostError, but then too its DMA has
   * ended. The kernel brings the command register back as it was before the reset.
   */
  stopDma(): void {
    if (!this.#dma) return;
    this.#setCommand(0, PCI_COMMAND_MASTER);
    this.#dma = false;
    if (this.#canReset) this.#kernel.ioctl(this.#fd, "VFIO_DEVICE_RESET", VFIO_DEVICE_RESET, 0);
  }

  /** Stop DMA, and give the function back. No thread uses a BAR any more. Idempotent. */
  close(): void {
    if (!this.#open) return;
    try {
      this.stopDma();
      this.#setCommand(0, PCI_COMMAND_MEMORY);
    } finally {
      this.#open = false;
      for (const { address, size } of this.#bars.splice(0)) this.#kernel.unmap(address, size);
      this.#kernel.close(this.#fd);
    }
  }

  #region(index: number) {
    const info = VfioRegionInfo.encode({ argsz: VfioRegionInfo.size, index });
    this.#kernel.ioctl(this.#fd, "VFIO_DEVICE_GET_REGION_INFO", VFIO_DEVICE_GET_REGION_INFO, info);
    return VfioRegionInfo.read(info);
  }

  #header() {
    const raw = new Uint8Array(PciHeader.size);
    this.#kernel.read(this.#fd, raw, this.#config);
    return PciHeader.read(raw);
  }

  #setCommand(set: number, clear: number): void {
    const { at, size } = PciHeader.fields.command;
    const raw = new Uint8Array(PciHeader.size);
    PciHeader.write(raw, { command: (this.#header().command & ~clear) | set });
    this.#kernel.write(this.#fd, raw.subarray(at, at + size), this.#config + at);
  }
}
