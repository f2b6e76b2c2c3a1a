/**
 * The PCI function of crosvm's coIOMMU, docs/abi.md section 5: names and values as in crosvm's devices/src/pci/coiommu.rs
 * and in the drivers of ChromeOS kernels (drivers/pci/controller/pci-coiommu.c).
 */
import { bytes, le16, le64, le64bits, struct } from "./struct.ts";

export const PCI_VENDOR_ID_COIOMMU = 0x1234;
export const PCI_DEVICE_ID_COIOMMU = 0xabcd;
export const COIOMMU_REVISION_ID = 0x10;

/** BARs: registers and triggers; a request slot for each vCPU; which functions are assigned. */
export const COIOMMU_MMIO_BAR = 0;
export const COIOMMU_NOTIFYMAP_BAR = 2;
export const COIOMMU_TOPOLOGYMAP_BAR = 4;
export const COIOMMU_BAR_SIZE = 0x2000;

export const COIOMMU_CMD_DEACTIVATE = 0;
export const COIOMMU_CMD_ACTIVATE = 1;
export const COIOMMU_CMD_PARK_UNPIN = 2;
export const COIOMMU_CMD_UNPARK_UNPIN = 3;

/** At the start of the registers; a trigger byte for each vCPU follows. */
export const CoiommuRegisters = struct("coiommu_mmio_info", 24, {
  dttRoot: le64(0),
  command: le64(8),
  dttLevel: le64(16),
});
export const COIOMMU_TRIGGERS = CoiommuRegisters.size;

/** A request slot: 0 when it is free; `gfn << 16 | bdf`, or this bit and the GPA of a PinPagesInfo. */
export const PIN_PAGES_IN_BATCH = 1n << 63n;
export const CoiommuSlot = struct("coiommu_notify_info", 8, { data: le64bits(0) });

/** nrPages frame numbers of 64 bits follow. */
export const PinPagesInfo = struct("pin_pages_info", 16, {
  bdf: le16(0),
  pad: bytes(6)(2),
  nrPages: le64(8),
});
export const PFN_SIZE = 8;
