import type { Bdf, Gfn } from "../base/units.ts";
import { IOVA_PAGES } from "../tracking/iova-tables.ts";
import type { Remapping } from "../tracking/remapping.ts";
import {
  ReqAttach,
  ReqDetach,
  ReqMap,
  ReqUnmap,
  VIRTIO_IOMMU_ATTACH_F_BYPASS,
  VIRTIO_IOMMU_MAP_F_READ,
  VIRTIO_IOMMU_MAP_F_WRITE,
  VIRTIO_IOMMU_S_INVAL,
  VIRTIO_IOMMU_S_NOENT,
  VIRTIO_IOMMU_S_RANGE,
  VIRTIO_IOMMU_S_UNSUPP,
} from "../wire/virtio-iommu.ts";
import type { Assigned } from "./device.ts";

/** x86 writes to this window are interrupts, never memory. Intel SDM volume 3, "Message Address Register". */
export const MSI_WINDOW = { start: 0xfee0_0000, end: 0xfeef_ffff };
/** The addresses that devices of ours can use: input_range.end. */
export const INPUT_END = BigInt(IOVA_PAGES) * 4096n - 1n;

const MAP_FLAGS = VIRTIO_IOMMU_MAP_F_READ | VIRTIO_IOMMU_MAP_F_WRITE;
const isAligned = (address: bigint): boolean => (address & 0xfffn) === 0n;
const pageOf = (address: bigint): number => Number(address >> 12n);

/** Addresses that endpoints can use; `end` is inclusive. */
export interface InputRange {
  readonly start: bigint;
  readonly end: bigint;
}

/** ATTACH, DETACH, MAP and UNMAP: VIRTIO 1.2 sections 5.13.6.3 to 5.13.6.6, whose sentences are quoted. */
export class RemappingRequests {
  readonly #remapping: Remapping;
  readonly #assigned: Assigned;
  input: InputRange = { start: 0n, end: INPUT_END };

  constructor(remapping: Remapping, assigned: Assigned) {
    this.#remapping = remapping;
    this.#assigned = assigned;
  }

  /** `known`: flags that exist, BYPASS with BYPASS_CONFIG. */
  attach(request: Uint8Array, known: number): number {
    if (request.length < ReqAttach.size) return VIRTIO_IOMMU_S_INVAL;
    const { domain, endpoint, flags, reserved } = ReqAttach.read(request);
    // "If the reserved field of an ATTACH request is not zero, the device MUST reject the request and set status to
    // VIRTIO_IOMMU_S_INVAL." "If the device does not recognize a flags bit, it MUST reject the request and set status to
    // VIRTIO_IOMMU_S_INVAL."
    if (reserved.some((b) => b !== 0) || flags & ~known) return VIRTIO_IOMMU_S_INVAL;
    // "If the endpoint identified by endpoint doesn't exist, the device MUST reject the request and set status to
    // VIRTIO_IOMMU_S_NOENT."
    if (!this.#assigned.has(endpoint as Bdf)) return VIRTIO_IOMMU_S_NOENT;
    const device = this.#assigned.get(endpoint as Bdf);
    if (device === undefined) return VIRTIO_IOMMU_S_UNSUPP; // another IOMMU says what it reaches
    return this.#remapping.attach(device, domain, (flags & VIRTIO_IOMMU_ATTACH_F_BYPASS) !== 0);
  }

  detach(request: Uint8Array): number {
    if (request.length < ReqDetach.size) return VIRTIO_IOMMU_S_INVAL;
    // "The device MUST ignore reserved."
    const { domain, endpoint } = ReqDetach.read(request);
    // "If the endpoint identified by endpoint doesn't exist, then the device MUST reject the request and set status to
    // VIRTIO_IOMMU_S_NOENT."
    if (!this.#assigned.has(endpoint as Bdf)) return VIRTIO_IOMMU_S_NOENT;
    const device = this.#assigned.get(endpoint as Bdf);
    return device === undefined ? VIRTIO_IOMMU_S_UNSUPP : this.#remapping.detach(device, domain);
  }

  map(request: Uint8Array): number {
    if (request.length < ReqMap.size) return VIRTIO_IOMMU_S_INVAL;
    const { domain, virtStart, virtEnd, physStart, flags } = ReqMap.read(request);
    // "If the device doesn't recognize a flags bit, it MUST reject the request and set status to VIRTIO_IOMMU_S_INVAL."
    // MMIO is not one without VIRTIO_IOMMU_F_MMIO, which is not offered.
    if (flags & ~MAP_FLAGS || virtEnd < virtStart) return VIRTIO_IOMMU_S_INVAL;
    // "If virt_start, phys_start or (virt_end + 1) is not aligned on the page granularity, the device SHOULD reject the
    // request and set status to VIRTIO_IOMMU_S_RANGE."
    if (!isAligned(virtStart) || physStart % 4096 || !isAligned(virtEnd + 1n)) return VIRTIO_IOMMU_S_RANGE;
    // Section 5.13.6: "Any mapping request to virtual addresses outside of this range fails."
    if (virtStart < this.input.start || virtEnd > this.input.end) return VIRTIO_IOMMU_S_RANGE;
    // "The device SHOULD reject a MAP request that overlaps a RESV_MEM region."
    if (virtStart <= MSI_WINDOW.end && virtEnd >= MSI_WINDOW.start) return VIRTIO_IOMMU_S_RANGE;
    const [first, last] = [pageOf(virtStart), pageOf(virtEnd)];
    return this.#remapping.map(domain, { first, last, gfn: (physStart / 4096) as Gfn, flags });
  }

  unmap(request: Uint8Array): number {
    if (request.length < ReqUnmap.size) return VIRTIO_IOMMU_S_INVAL;
    const { domain, virtStart, virtEnd, reserved } = ReqUnmap.read(request);
    // "If the reserved field of an UNMAP request is not zero, the device MAY set the request status to
    // VIRTIO_IOMMU_S_INVAL".
    if (reserved.some((b) => b !== 0) || virtEnd < virtStart) return VIRTIO_IOMMU_S_INVAL;
    const [first, last] = [pageOf(virtStart), pageOf(virtEnd)];
    // An end inside a page that is mapped would split its mapping.
    const splits =
      (!isAligned(virtStart) && this.#remapping.isMapped(domain, first)) ||
      (!isAligned(virtEnd + 1n) && this.#remapping.isMapped(domain, last));
    return splits ? VIRTIO_IOMMU_S_RANGE : this.#remapping.unmap(domain, first, last);
  }
}
