import { PeerError } from "../base/errors.ts";
import type { Gpa } from "../base/units.ts";
import type { GuestAccess } from "../memory/guest-memory.ts";
import {
  PCI_CAP_ID_VNDR,
  PCI_COMMAND_WRITABLE,
  PCI_CONFIG_SIZE,
  PCI_STATUS_CAP_LIST,
  PciHeader,
  VIRTIO_F_VERSION_1,
  VIRTIO_MSI_NO_VECTOR,
  VIRTIO_PCI_CAP_COMMON_CFG,
  VIRTIO_PCI_CAP_DEVICE_CFG,
  VIRTIO_PCI_CAP_ISR_CFG,
  VIRTIO_PCI_CAP_NOTIFY_CFG,
  VIRTIO_PCI_DEVICE_ID_BASE,
  VIRTIO_PCI_VENDOR_ID,
  VIRTIO_STATUS_DRIVER_OK,
  VIRTIO_STATUS_FEATURES_OK,
  VIRTIO_STATUS_NEEDS_RESET,
  VirtioPciCap,
  VirtioPciCommonCfg,
  VirtioPciNotifyCap,
} from "../wire/pci.ts";
import { completedBy, getUint, putUint } from "../wire/struct.ts";
import type { PciFunction, VirtioDevice } from "./device.ts";
import { type QueueLayout, SplitQueue } from "./queue.ts";

/** One 16 KiB memory BAR: a page for each structure of VIRTIO 1.2 section 4.1.4. */
const BAR_SIZE = 0x4000;
const COMMON = 0x0000;
const ISR = 0x1000;
const DEVICE = 0x2000;
const NOTIFY = 0x3000;
const PAGE = 0x1000;
const NOTIFY_MULTIPLIER = 4;

interface QueueState {
  size: number;
  desc: bigint;
  driver: bigint;
  device: bigint;
  ring: SplitQueue | undefined;
}

/**
 * A virtio device as a modern PCI function, VIRTIO 1.2 section 4.1. Without interrupts: the transport has none for
 * it (mpqemu under TCG), and drivers poll the request queue of virtio-iommu.
 */
export class VirtioPciFunction implements PciFunction {
  readonly #device: VirtioDevice;
  readonly #memory: GuestAccess;
  readonly #config: Uint8Array<ArrayBuffer>;
  #status = 0;
  #deviceFeatureSelect = 0;
  #driverFeatureSelect = 0;
  #driverFeatures = 0n;
  #queueSelect = 0;
  #queues: QueueState[] = [];
  /** Accesses outside every register, broken rings: what a correct driver never causes. */
  peerErrors = 0;

  constructor(device: VirtioDevice, memory: GuestAccess) {
    this.#device = device;
    this.#memory = memory;
    this.#config = configSpace(device);
    this.#resetDevice();
  }

  configRead(offset: number, size: number): number {
    return Number(getUint(this.#config, offset, size));
  }

  configWrite(offset: number, size: number, value: number): void {
    putUint(this.#config, offset, size, BigInt(value >>> 0));
    const after = PciHeader.read(this.#config);
    // All is read-only but the command register, BAR0 (memory, 32 bit) and the interrupt line.
    const next = configSpace(this.#device);
    PciHeader.write(next, {
      command: after.command & PCI_COMMAND_WRITABLE,
      bar0: (after.bar0 & ~(BAR_SIZE - 1)) >>> 0,
      interruptLine: after.interruptLine,
    });
    this.#config.set(next);
  }

  barRead(address: number, size: number): bigint {
    const offset = this.#offset(address, size);
    const out = new Uint8Array(8);
    if (offset < COMMON + VirtioPciCommonCfg.size) out.set(this.#common().subarray(offset, offset + size));
    else if (offset >= DEVICE && offset + size <= DEVICE + this.#device.configSize)
      this.#device.configRead(offset - DEVICE, out.subarray(0, size));
    return getUint(out, 0, size);
  }

  barWrite(address: number, size: number, value: bigint): void {
    const offset = this.#offset(address, size);
    if (offset < COMMON + VirtioPciCommonCfg.size) this.#writeCommon(offset, size, value);
    else if (offset >= NOTIFY && offset < NOTIFY + PAGE)
      this.#notify(Math.floor((offset - NOTIFY) / NOTIFY_MULTIPLIER));
    else if (offset >= DEVICE && offset + size <= DEVICE + this.#device.configSize) {
      const bytes = new Uint8Array(size);
      putUint(bytes, 0, size, value);
      this.#device.configWrite(offset - DEVICE, bytes);
    } else if (offset < ISR || offset >= BAR_SIZE) this.peerErrors++;
  }

  reset(): void {
    this.#config.set(configSpace(this.#device));
    this.#resetDevice();
    this.#device.machineReset();
  }

  /** Let the device use a queue of its own accord. Undefined: the driver has not set it up, or all must be reset. */
  withQueue(index: number, use: (queue: SplitQueue | undefined) => void): void {
    this.#guard(() => use(this.#live(index)));
  }

  /** mpqemu gives absolute addresses; while the BAR is unmapped, 0-based ones. */
  #offset(address: number, size: number): number {
    const { bar0 } = PciHeader.read(this.#config);
    const offset = address >= bar0 && address + size <= bar0 + BAR_SIZE ? address - bar0 : address;
    return offset + size <= BAR_SIZE ? offset : BAR_SIZE;
  }

  #common(): Uint8Array {
    const queue = this.#queues[this.#queueSelect];
    return VirtioPciCommonCfg.encode({
      deviceFeatureSelect: this.#deviceFeatureSelect,
      deviceFeature: half(this.#device.features, this.#deviceFeatureSelect),
      driverFeatureSelect: this.#driverFeatureSelect,
      driverFeature: half(this.#driverFeatures, this.#driverFeatureSelect),
      configMsixVector: VIRTIO_MSI_NO_VECTOR,
      numQueues: this.#queues.length,
      deviceStatus: this.#status,
      // Section 4.1.4.3.1: a new value after each change, so that a driver sees when its reads do not belong together.
      configGeneration: this.#device.configGeneration & 0xff,
      queueSelect: this.#queueSelect,
      // Section 4.1.4.3.1: queue_size is 0 for a queue that does not exist.
      queueSize: queue?.size ?? 0,
      queueMsixVector: VIRTIO_MSI_NO_VECTOR,
      queueEnable: queue?.ring ? 1 : 0,
      queueNotifyOff: queue ? this.#queueSelect : 0,
      queueDesc: queue?.desc ?? 0n,
      queueDriver: queue?.driver ?? 0n,
      queueDevice: queue?.device ?? 0n,
    });
  }

  #writeCommon(offset: number, size: number, value: bigint): void {
    const bytes = this.#common();
    if (offset + size > bytes.length) return;
    putUint(bytes, offset, size, value);
    const now = VirtioPciCommonCfg.read(bytes);
    const written = completedBy(VirtioPciCommonCfg, offset, size);
    if (written.has("deviceFeatureSelect")) this.#deviceFeatureSelect = now.deviceFeatureSelect;
    if (written.has("driverFeatureSelect")) this.#driverFeatureSelect = now.driverFeatureSelect;
    if (written.has("driverFeature")) this.#writeFeatures(now.driverFeature);
    if (written.has("queueSelect")) this.#queueSelect = now.queueSelect;
    const queue = this.#queues[this.#queueSelect];
    if (queue && !queue.ring && !written.has("queueSelect")) {
      // Section 4.1.4.3.2: the driver may write a smaller size.
      if (now.queueSize <= this.#device.queueSizes[this.#queueSelect]!) queue.size = now.queueSize;
      // A 64-bit register is written in two halves; each lands in its place.
      queue.desc = now.queueDesc;
      queue.driver = now.queueDriver;
      queue.device = now.queueDevice;
      if (written.has("queueEnable") && now.queueEnable === 1) this.#enable(queue);
    }
    if (written.has("deviceStatus")) this.#writeStatus(now.deviceStatus);
  }

  #writeFeatures(value: number): void {
    // Section 3.1.1: features are settled by FEATURES_OK.
    if (this.#driverFeatureSelect > 1 || this.#status & VIRTIO_STATUS_FEATURES_OK) return;
    const shift = BigInt(32 * this.#driverFeatureSelect);
    this.#driverFeatures = (this.#driverFeatures & ~(0xffff_ffffn << shift)) | (BigInt(value) << shift);
  }

  #writeStatus(status: number): void {
    // Section 2.1.2: writing 0 resets the device.
    if (status === 0) {
      this.#resetDevice();
      return;
    }
    let next = status | (this.#status & VIRTIO_STATUS_NEEDS_RESET);
    const settled = this.#status & VIRTIO_STATUS_FEATURES_OK;
    if (next & VIRTIO_STATUS_FEATURES_OK && !settled && !this.#featuresAcceptable())
      next &= ~VIRTIO_STATUS_FEATURES_OK;
    const starts = next & VIRTIO_STATUS_DRIVER_OK && !(this.#status & VIRTIO_STATUS_DRIVER_OK);
    if (starts && !(next & VIRTIO_STATUS_FEATURES_OK)) next &= ~VIRTIO_STATUS_DRIVER_OK;
    const settles = next & VIRTIO_STATUS_FEATURES_OK && !settled;
    this.#status = next;
    // The driver uses the device configuration between FEATURES_OK and DRIVER_OK too.
    if (settles) this.#device.start(this.#driverFeatures);
  }

  #featuresAcceptable(): boolean {
    const features = this.#driverFeatures;
    return (
      (features & ~this.#device.features) === 0n &&
      (features & (1n << BigInt(VIRTIO_F_VERSION_1))) !== 0n &&
      this.#device.accepts(features)
    );
  }

  #enable(queue: QueueState): void {
    const layout: QueueLayout = {
      size: queue.size,
      desc: Number(queue.desc) as Gpa,
      driver: Number(queue.driver) as Gpa,
      device: Number(queue.device) as Gpa,
    };
    this.#guard(() => {
      queue.ring = new SplitQueue(this.#memory, layout);
    });
  }

  #notify(index: number): void {
    const ring = this.#live(index);
    if (ring) this.#guard(() => this.#device.kick(index, ring));
  }

  #live(index: number): SplitQueue | undefined {
    const live = VIRTIO_STATUS_DRIVER_OK;
    const ready = (this.#status & (live | VIRTIO_STATUS_NEEDS_RESET)) === live;
    return ready ? this.#queues[index]?.ring : undefined;
  }

  /** Section 2.1.2: a device that met what it cannot recover from sets DEVICE_NEEDS_RESET. */
  #guard(action: () => void): void {
    try {
      action();
    } catch (error) {
      if (!(error instanceof PeerError)) throw error;
      this.peerErrors++;
      this.#status |= VIRTIO_STATUS_NEEDS_RESET;
    }
  }

  #resetDevice(): void {
    this.#status = 0;
    this.#deviceFeatureSelect = this.#driverFeatureSelect = this.#queueSelect = 0;
    this.#driverFeatures = 0n;
    this.#queues = this.#device.queueSizes.map((size) => ({
      size,
      desc: 0n,
      driver: 0n,
      device: 0n,
      ring: undefined,
    }));
    this.#device.reset();
  }
}

const half = (features: bigint, select: number): number =>
  select > 1 ? 0 : Number((features >> BigInt(32 * select)) & 0xffff_ffffn);

function configSpace(device: VirtioDevice): Uint8Array<ArrayBuffer> {
  const space = PciHeader.encode(
    {
      vendorId: VIRTIO_PCI_VENDOR_ID,
      deviceId: VIRTIO_PCI_DEVICE_ID_BASE + device.id,
      status: PCI_STATUS_CAP_LIST,
      revision: 1, // section 4.1.2.1: not transitional
      subclass: 0x80,
      baseClass: 0x08, // "base system peripheral, other", as QEMU's virtio-iommu
      subsystemVendorId: VIRTIO_PCI_VENDOR_ID,
      subsystemId: 0x1100,
      capabilities: PciHeader.size,
      interruptPin: 1, // never raised; without a pin Linux finds no IRQ to request and gives up
    },
    PCI_CONFIG_SIZE - PciHeader.size,
  );
  const structures = [
    { cfgType: VIRTIO_PCI_CAP_COMMON_CFG, offset: COMMON, size: VirtioPciCommonCfg.size },
    { cfgType: VIRTIO_PCI_CAP_ISR_CFG, offset: ISR, size: 4 },
    { cfgType: VIRTIO_PCI_CAP_DEVICE_CFG, offset: DEVICE, size: device.configSize },
    { cfgType: VIRTIO_PCI_CAP_NOTIFY_CFG, offset: NOTIFY, size: PAGE },
  ];
  let at = PciHeader.size;
  structures.forEach((s, i) => {
    const last = i === structures.length - 1;
    const length = last ? VirtioPciNotifyCap.size : VirtioPciCap.size;
    const cap = { vndr: PCI_CAP_ID_VNDR, next: last ? 0 : at + length, length, ...s };
    if (last) VirtioPciNotifyCap.write(space, { ...cap, multiplier: NOTIFY_MULTIPLIER }, at);
    else VirtioPciCap.write(space, cap, at);
    at += length;
  });
  return space;
}
