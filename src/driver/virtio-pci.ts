import { ProtocolError } from "../base/errors.ts";
import type { PciFunction } from "../virtio/device.ts";
import type { QueueLayout } from "../virtio/queue.ts";
import {
  PCI_CAP_ID_VNDR,
  PCI_COMMAND_MASTER,
  PCI_COMMAND_MEMORY,
  PciHeader,
  VIRTIO_F_VERSION_1,
  VIRTIO_PCI_CAP_COMMON_CFG,
  VIRTIO_PCI_CAP_DEVICE_CFG,
  VIRTIO_PCI_CAP_NOTIFY_CFG,
  VIRTIO_STATUS_ACKNOWLEDGE,
  VIRTIO_STATUS_DRIVER,
  VIRTIO_STATUS_DRIVER_OK,
  VIRTIO_STATUS_FEATURES_OK,
  VirtioPciCommonCfg,
  VirtioPciNotifyCap,
} from "../wire/pci.ts";
import type { Value } from "../wire/struct.ts";
import { QUEUE_SIZE_MAX } from "../wire/virtqueue.ts";

type CommonField = keyof typeof VirtioPciCommonCfg.fields;
/** The list is of 4-byte aligned entries in 192 bytes, so that it cannot be longer; a cycle ends here too. */
const CAPABILITIES_MAX = 48;
/** Request queue and event queue of a virtio-iommu. */
const QUEUES_USED = 2;
const COMMON_FIELDS = VirtioPciCommonCfg.fields;

/** Where the function's structures are in its BAR: what other CPUs need to use it too. */
export interface VirtioPciPlaces {
  readonly common: number;
  readonly device: number;
  /** Of each queue that is used. */
  readonly notify: readonly number[];
}

/** Driver's side of a virtio device as a modern PCI function, VIRTIO 1.2 sections 3.1 and 4.1. */
export class VirtioPciDriver {
  readonly #function: PciFunction;
  readonly places: VirtioPciPlaces;

  constructor(pciFunction: PciFunction, places = findPlaces(pciFunction)) {
    this.#function = pciFunction;
    this.places = places;
  }

  /** Section 3.1.1, steps 1 to 6. Returns the features of `wanted` that the device has. */
  negotiate(wanted: bigint): bigint {
    this.reset();
    this.#set("deviceStatus", VIRTIO_STATUS_ACKNOWLEDGE);
    this.#set("deviceStatus", VIRTIO_STATUS_ACKNOWLEDGE | VIRTIO_STATUS_DRIVER);
    const features = this.#offered() & (wanted | (1n << BigInt(VIRTIO_F_VERSION_1)));
    for (const select of [0, 1]) {
      this.#set("driverFeatureSelect", select);
      this.#set("driverFeature", Number((features >> BigInt(32 * select)) & 0xffff_ffffn));
    }
    const status = VIRTIO_STATUS_ACKNOWLEDGE | VIRTIO_STATUS_DRIVER | VIRTIO_STATUS_FEATURES_OK;
    this.#set("deviceStatus", status);
    if (this.#get("deviceStatus") !== status) throw new ProtocolError("the device refuses the features");
    return features;
  }

  /** Section 4.1.5.1.3: `layout` gives the rings for the size that the device offers, or for fewer descriptors. */
  setUpQueue(index: number, layout: (size: number) => QueueLayout): QueueLayout {
    this.#set("queueSelect", index);
    const offered = this.#get("queueSize");
    if (offered === 0 || offered & (offered - 1) || offered > QUEUE_SIZE_MAX)
      throw new ProtocolError(`the device offers queue ${index} with ${offered} descriptors`);
    const queue = layout(offered);
    if (queue.size !== offered) this.#set("queueSize", queue.size);
    this.#set64("queueDesc", queue.desc);
    this.#set64("queueDriver", queue.driver);
    this.#set64("queueDevice", queue.device);
    this.#set("queueEnable", 1);
    return queue;
  }

  ready(): void {
    this.#set("deviceStatus", this.#get("deviceStatus") | VIRTIO_STATUS_DRIVER_OK);
  }

  reset(): void {
    this.#set("deviceStatus", 0);
  }

  notify(queue: number): void {
    this.#function.barWrite(this.places.notify[queue]!, 2, BigInt(queue));
  }

  /** Device configuration; 64-bit fields are written in two halves, section 4.1.3.1. */
  configRead(offset: number, size: number): number {
    return Number(this.#function.barRead(this.places.device + offset, size));
  }
  configWrite(offset: number, size: number, value: number): void {
    this.#write(this.places.device + offset, size, value);
  }

  #offered(): bigint {
    return [0, 1].reduce((features, select) => {
      this.#set("deviceFeatureSelect", select);
      return features | (BigInt(this.#get("deviceFeature")) << BigInt(32 * select));
    }, 0n);
  }

  #get(name: CommonField): number {
    const { at, size } = COMMON_FIELDS[name];
    return Number(this.#function.barRead(this.places.common + at, size));
  }

  #set(name: CommonField, value: number): void {
    const { at, size } = COMMON_FIELDS[name];
    this.#write(this.places.common + at, size, value);
  }

  #set64(name: "queueDesc" | "queueDriver" | "queueDevice", value: number): void {
    this.#write(this.places.common + COMMON_FIELDS[name].at, 8, value);
  }

  #write(at: number, size: number, value: number): void {
    if (size < 8) this.#function.barWrite(at, size, BigInt(value));
    else {
      this.#function.barWrite(at, 4, BigInt(value % 2 ** 32));
      this.#function.barWrite(at + 4, 4, BigInt(Math.floor(value / 2 ** 32)));
    }
  }
}

/** Walk the capabilities, section 4.1.4, and let the function decode its BAR and master the bus. */
function findPlaces(pciFunction: PciFunction): VirtioPciPlaces {
  const found = new Map<number, Value<typeof VirtioPciNotifyCap.fields>>();
  let at = pciFunction.configRead(PciHeader.fields.capabilities.at, 1);
  for (let n = 0; at !== 0 && n < CAPABILITIES_MAX; n++) {
    const words = Uint32Array.from({ length: VirtioPciNotifyCap.size / 4 }, (_, i) =>
      pciFunction.configRead(at + 4 * i, 4),
    );
    const cap = VirtioPciNotifyCap.read(new Uint8Array(words.buffer));
    if (cap.vndr === PCI_CAP_ID_VNDR && !found.has(cap.cfgType)) found.set(cap.cfgType, cap);
    at = cap.next;
  }
  const common = found.get(VIRTIO_PCI_CAP_COMMON_CFG);
  const device = found.get(VIRTIO_PCI_CAP_DEVICE_CFG);
  const notify = found.get(VIRTIO_PCI_CAP_NOTIFY_CFG);
  if (!common || !device || !notify) throw new ProtocolError("the function is no modern virtio device");
  const command = PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER;
  pciFunction.configWrite(PciHeader.fields.command.at, 2, command);
  const notifyAt = (queue: number): number => {
    pciFunction.barWrite(common.offset + COMMON_FIELDS.queueSelect.at, 2, BigInt(queue));
    const off = pciFunction.barRead(common.offset + COMMON_FIELDS.queueNotifyOff.at, 2);
    return notify.offset + Number(off) * notify.multiplier;
  };
  const queues = Array.from({ length: QUEUES_USED }, (_, queue) => queue);
  return { common: common.offset, device: device.offset, notify: queues.map(notifyAt) };
}
