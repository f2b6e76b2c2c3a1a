import { HostError } from "../../src/base/errors.ts";
import { type Ioctl, KernelStruct } from "../../src/host/ioctl.ts";
import { addressOf } from "../../src/host/libc.ts";
import * as uapi from "../../src/wire/iommufd.ts";
import * as type1 from "../../src/wire/vfio-type1.ts";

/** The IOVAs of an emulated VT-d, in pairs: 39 bits, and the hole where interrupts go. */
export const VTD_RANGES: readonly number[] = [0, 0xfedf_ffff, 0xfef0_0000, 0x7f_ffff_ffff];

const PAGE = 4096;
const refuse = (errno: string): never => {
  throw new HostError("ioctl", errno);
};

interface Mapping {
  readonly address: number;
  readonly length: number;
}

/** The mappings of a domain, with the rules of Linux 6.1 drivers/vfio/vfio_iommu_type1.c that a process can see. */
export class FakeIommu {
  /** By IOVA. */
  readonly mappings = new Map<number, Mapping>();
  ranges = VTD_RANGES;
  /** Bytes that may be mapped. */
  memlock = Number.POSITIVE_INFINITY;
  /** Addresses of pages that this process does not have. */
  readonly absent = new Set<number>();
  /** The names of the calls, in order. */
  readonly calls: string[] = [];
  /** Refuse the call of this name, once, with this errno. */
  fault: { readonly call: string; readonly errno: string } | undefined;

  get bytes(): number {
    return [...this.mappings.values()].reduce((sum, { length }) => sum + length, 0);
  }

  /** As the tests look at it: [IOVA, address, length], ascending. */
  get table(): (readonly [iova: number, address: number, length: number])[] {
    return [...this.mappings]
      .map(([iova, { address, length }]) => [iova, address, length] as const)
      .sort(([a], [b]) => a - b);
  }

  called(name: string): void {
    this.calls.push(name);
    if (this.fault?.call !== name) return;
    const { errno } = this.fault;
    this.fault = undefined;
    refuse(errno);
  }

  overlaps(iova: number, length: number): [number, Mapping][] {
    return [...this.mappings].filter(([at, m]) => at < iova + length && iova < at + m.length);
  }

  map(address: number, iova: number, length: number, hasRoom = true): void {
    if (length <= 0 || [address, iova, length].some((n) => n % PAGE !== 0)) refuse("EINVAL");
    if (this.overlaps(iova, length).length > 0) refuse("EEXIST");
    if (!hasRoom) refuse("ENOSPC");
    if (!this.isAllowed(iova, iova + length - 1)) refuse("EINVAL");
    for (let at = address; at < address + length; at += PAGE) if (this.absent.has(at)) refuse("EFAULT");
    if (this.bytes + length > this.memlock) refuse("ENOMEM");
    this.mappings.set(iova, { address, length });
  }

  /** Undefined where a mapping would be split. */
  unmap(iova: number, length: number): number | undefined {
    const found = this.overlaps(iova, length);
    if (found.some(([at, m]) => at < iova || at + m.length > iova + length)) return undefined;
    for (const [at] of found) this.mappings.delete(at);
    return found.reduce((sum, [, m]) => sum + m.length, 0);
  }

  isAllowed(first: number, last: number): boolean {
    return this.ranges.some((start, i) => i % 2 === 0 && first >= start && last <= this.ranges[i + 1]!);
  }
}

export const bytesOf = (argument: Uint8Array | KernelStruct): Uint8Array =>
  argument instanceof KernelStruct ? argument.bytes : argument;

/** A VFIO container of type 1, version 2, with that fd. */
export class FakeContainer {
  readonly fd = 77;
  readonly iommu = new FakeIommu();
  /** `dma_entry_limit`. */
  entryLimit = 65535;
  hasUnmapAll = true;
  hasCapabilities = true;
  pageSizes = 0xffff_ffff_ffff_f000n;

  readonly ioctl: Ioctl = (fd, name, request, argument) => {
    if (fd !== this.fd) refuse("EBADF");
    this.iommu.called(name);
    if (typeof argument === "number") {
      if (request !== type1.VFIO_CHECK_EXTENSION) refuse("ENOTTY");
      return Number(argument === type1.VFIO_UNMAP_ALL && this.hasUnmapAll);
    }
    const bytes = bytesOf(argument);
    if (request === type1.VFIO_IOMMU_GET_INFO) this.#getInfo(bytes);
    else if (request === type1.VFIO_IOMMU_MAP_DMA) this.#map(bytes);
    else if (request === type1.VFIO_IOMMU_UNMAP_DMA) this.#unmap(bytes);
    else refuse("ENOTTY");
    return 0;
  };

  #map(bytes: Uint8Array): void {
    const { argsz, flags, vaddr, iova, size } = type1.DmaMap.read(bytes);
    if (argsz < type1.DmaMap.size || flags !== 3) refuse("EINVAL");
    this.iommu.map(vaddr, iova, size, this.iommu.mappings.size < this.entryLimit);
  }

  #unmap(bytes: Uint8Array): void {
    const { argsz, flags, iova, size } = type1.DmaUnmap.read(bytes);
    const all = flags === type1.VFIO_DMA_UNMAP_FLAG_ALL;
    if (argsz < type1.DmaUnmap.size || (flags !== 0 && !all)) refuse("EINVAL");
    if (all ? iova !== 0 || size !== 0 || !this.hasUnmapAll : size === 0) refuse("EINVAL");
    const unmapped = this.iommu.unmap(iova, all ? 2 ** 53 : size) ?? refuse("EINVAL");
    type1.DmaUnmap.write(bytes, { size: unmapped });
  }

  /** As type 1 does: with too little room, the size that would do, and no capability. */
  #getInfo(bytes: Uint8Array): void {
    const { argsz } = type1.Type1Info.read(bytes);
    const { ranges } = this.iommu;
    const rangesAt = type1.Type1Info.size;
    const availAt = rangesAt + type1.IovaRangesCap.size + ranges.length * 8;
    const end = availAt + 16;
    const flags = type1.VFIO_IOMMU_INFO_PGSIZES + (this.hasCapabilities ? type1.VFIO_IOMMU_INFO_CAPS : 0);
    type1.Type1Info.write(bytes, { flags, iovaPgsizes: this.pageSizes });
    if (!this.hasCapabilities) return;
    type1.Type1Info.write(bytes, { argsz: end, capOffset: argsz < end ? 0 : rangesAt });
    if (argsz < end) return;
    type1.IovaRangesCap.write(bytes, { nrIovas: ranges.length / 2 }, rangesAt);
    type1.InfoCapHeader.write(bytes, { id: 1, version: 1, next: availAt }, rangesAt);
    for (let i = 0; i < ranges.length; i += 2)
      type1.IovaRange.write(
        bytes,
        { start: ranges[i]!, last: ranges[i + 1]! },
        rangesAt + type1.IovaRangesCap.size + i * 8,
      );
    type1.DmaAvailCap.write(bytes, { avail: this.entryLimit - this.iommu.mappings.size }, availAt);
    type1.InfoCapHeader.write(bytes, { id: 3, version: 1, next: 0 }, availAt);
  }
}

/** An iommufd with that fd, and one I/O address space: Linux 6.12 drivers/iommu/iommufd/{ioas,io_pagetable}.c. */
export class FakeIommufd {
  readonly fd = 78;
  readonly ioas = 5;
  readonly iommu = new FakeIommu();
  alignment = 4096;

  readonly ioctl: Ioctl = (fd, name, request, argument) => {
    if (fd !== this.fd) refuse("EBADF");
    this.iommu.called(name);
    if (typeof argument === "number") return refuse("ENOTTY");
    if (request === uapi.IOMMU_IOAS_IOVA_RANGES) this.#ranges(bytesOf(argument));
    else if (request === uapi.IOMMU_IOAS_MAP) this.#map(bytesOf(argument));
    else if (request === uapi.IOMMU_IOAS_UNMAP) this.#unmap(bytesOf(argument));
    else refuse("ENOTTY");
    return 0;
  };

  #checkId(id: number): void {
    if (id !== this.ioas) refuse("ENOENT");
  }

  #ranges(bytes: Uint8Array): void {
    const { ioasId, numIovas, reserved, allowedIovas } = uapi.IoasIovaRanges.read(bytes);
    if (reserved !== 0) refuse("EOPNOTSUPP");
    this.#checkId(ioasId);
    const { ranges } = this.iommu;
    // The array is in the caller's buffer: nobody else's memory is written.
    const at = allowedIovas - addressOf(bytes);
    for (let i = 0; i < ranges.length / 2 && i < numIovas; i++)
      type1.IovaRange.write(bytes, { start: ranges[2 * i]!, last: ranges[2 * i + 1]! }, at + 16 * i);
    uapi.IoasIovaRanges.write(bytes, { numIovas: ranges.length / 2, outIovaAlignment: this.alignment });
    if (ranges.length / 2 > numIovas) refuse("EMSGSIZE");
  }

  #map(bytes: Uint8Array): void {
    const { size, flags, ioasId, reserved, userVa, length, iova } = uapi.IoasMap.read(bytes);
    if (size !== uapi.IoasMap.size || flags !== 7 || reserved !== 0) refuse("EOPNOTSUPP");
    this.#checkId(ioasId);
    this.iommu.map(userVa, iova, length);
  }

  #unmap(bytes: Uint8Array): void {
    const { size, ioasId, iova, length } = uapi.IoasUnmap.read(bytes);
    if (size !== uapi.IoasUnmap.size) refuse("EINVAL");
    this.#checkId(ioasId);
    const all = iova === 0 && bytes.subarray(16).every((byte) => byte === 0xff);
    if (!all && length >= 2 ** 64) refuse("EOVERFLOW");
    const unmapped = this.iommu.unmap(iova, length) ?? refuse("ENOENT");
    if (unmapped === 0 && !all) refuse("ENOENT");
    uapi.IoasUnmap.write(bytes, { length: unmapped });
  }
}
