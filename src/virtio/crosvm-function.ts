import { HostError, NotGuestRam } from "../base/errors.ts";
import { type Bdf, FRAME_SIZE } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import type { Tracker } from "../tracking/tracker.ts";
import {
  COIOMMU_BAR_SIZE,
  COIOMMU_CMD_ACTIVATE,
  COIOMMU_CMD_DEACTIVATE,
  COIOMMU_CMD_PARK_UNPIN,
  COIOMMU_CMD_UNPARK_UNPIN,
  COIOMMU_MMIO_BAR,
  COIOMMU_NOTIFYMAP_BAR,
  COIOMMU_REVISION_ID,
  COIOMMU_TOPOLOGYMAP_BAR,
  COIOMMU_TRIGGERS,
  CoiommuRegisters,
  CoiommuSlot,
  PCI_DEVICE_ID_COIOMMU,
  PCI_VENDOR_ID_COIOMMU,
  PFN_SIZE,
  PIN_PAGES_IN_BATCH,
  PinPagesInfo,
} from "../wire/crosvm.ts";
import { barRegister, PCI_COMMAND_WRITABLE, PCI_CONFIG_SIZE, PciHeader } from "../wire/pci.ts";
import { completedBy, getUint, putUint } from "../wire/struct.ts";
import { VIRTIO_IOMMU_S_OK } from "../wire/virtio-iommu.ts";
import type { Assigned, PciFunction } from "./device.ts";

const BARS = [COIOMMU_MMIO_BAR, COIOMMU_NOTIFYMAP_BAR, COIOMMU_TOPOLOGYMAP_BAR];
/** Request slots, and so vCPUs that can ask. */
const SLOTS = COIOMMU_BAR_SIZE / CoiommuSlot.size;
/** Frames of a batch that are looked at together: its list is read piece by piece, each piece once. */
const PIECE_FRAMES = 512;

export interface CrosvmFunctionOptions {
  readonly memory: GuestMemory;
  readonly tracker: Tracker;
  readonly assigned: Assigned;
  /** Told what the host refused while nobody waited for an answer. */
  hostError(error: HostError): void;
}

/**
 * The same backend behind the PCI function that crosvm has, docs/abi.md section 5: for guests whose driver was written
 * for that one. A failed pin leaves P clear, and that is all a driver learns.
 *
 * A driver cannot say that its table is complete, so what it never claimed stays pinned.
 */
export class CrosvmFunction implements PciFunction {
  readonly #o: CrosvmFunctionOptions;
  readonly #config = configSpace();
  readonly #registers = new Uint8Array(CoiommuRegisters.size);
  readonly #slots = new Uint8Array(COIOMMU_BAR_SIZE);
  /** Accesses and requests that a correct driver never makes. */
  peerErrors = 0;

  constructor(options: CrosvmFunctionOptions) {
    this.#o = options;
  }

  configRead(offset: number, size: number): number {
    return Number(getUint(this.#config, offset, size));
  }

  configWrite(offset: number, size: number, value: number): void {
    putUint(this.#config, offset, size, BigInt(value >>> 0));
    const after = this.#config.slice();
    const { command, interruptLine } = PciHeader.read(after);
    this.#config.set(configSpace());
    PciHeader.write(this.#config, { command: command & PCI_COMMAND_WRITABLE, interruptLine });
    for (const bar of BARS) {
      const address = getUint(after, barRegister(bar), 4) & ~BigInt(COIOMMU_BAR_SIZE - 1);
      putUint(this.#config, barRegister(bar), 4, address);
    }
  }

  barRead(address: number, size: number): bigint {
    const { bar, offset } = this.#decode(address, size);
    switch (bar) {
      case COIOMMU_MMIO_BAR:
        return getUint(this.#registers, offset, size); // beyond the registers 0
      case COIOMMU_NOTIFYMAP_BAR:
        return getUint(this.#slots, offset, size);
      case COIOMMU_TOPOLOGYMAP_BAR:
        return getUint(this.#topology(), offset, size);
      default:
        return 0n;
    }
  }

  barWrite(address: number, size: number, value: bigint): void {
    const { bar, offset } = this.#decode(address, size);
    if (bar === COIOMMU_NOTIFYMAP_BAR) putUint(this.#slots, offset, size, value);
    else if (bar !== COIOMMU_MMIO_BAR) this.peerErrors++;
    else if (offset + size <= CoiommuRegisters.size) this.#writeRegister(offset, size, value);
    else if (offset >= COIOMMU_TRIGGERS && offset < COIOMMU_TRIGGERS + SLOTS)
      this.#serve(offset - COIOMMU_TRIGGERS);
    else this.peerErrors++;
  }

  /** Reset of the whole machine. */
  reset(): void {
    const { tracker, hostError } = this.#o;
    this.#config.set(configSpace());
    this.#registers.fill(0);
    this.#slots.fill(0);
    if (tracker.active) tracker.deactivate("device-reset");
    try {
      tracker.machineReset();
    } catch (error) {
      if (!(error instanceof HostError)) throw error;
      hostError(error);
    }
  }

  /** Functions come and go. */
  #topology(): Uint8Array {
    const topology = new Uint8Array(COIOMMU_BAR_SIZE);
    const bdfs = [...this.#o.assigned.keys()].slice(0, COIOMMU_BAR_SIZE / 2 - 1);
    putUint(topology, 0, 2, BigInt(bdfs.length));
    bdfs.forEach((bdf, i) => void putUint(topology, 2 * (i + 1), 2, BigInt(bdf)));
    return topology;
  }

  /** mpqemu gives absolute addresses; while the BARs are unmapped, 0-based ones, which can only mean the registers. */
  #decode(address: number, size: number): { bar: number; offset: number } {
    for (const bar of BARS) {
      const base = Number(getUint(this.#config, barRegister(bar), 4));
      if (base !== 0 && address >= base && address + size <= base + COIOMMU_BAR_SIZE)
        return { bar, offset: address - base };
    }
    return address + size <= COIOMMU_BAR_SIZE
      ? { bar: COIOMMU_MMIO_BAR, offset: address }
      : { bar: -1, offset: 0 };
  }

  /** A 64-bit register may come in two halves, low one first: the command counts when its last byte is there. */
  #writeRegister(offset: number, size: number, value: bigint): void {
    putUint(this.#registers, offset, size, value);
    if (completedBy(CoiommuRegisters, offset, size).has("command")) this.#execute();
  }

  #execute(): void {
    const { tracker } = this.#o;
    const { command, dttRoot, dttLevel } = CoiommuRegisters.read(this.#registers);
    const active = tracker.active;
    if (command === COIOMMU_CMD_ACTIVATE) {
      if (tracker.activate(dttRoot, dttLevel, false)) return;
      this.peerErrors++;
      if (active) tracker.deactivate("pin-off");
    } else if (command === COIOMMU_CMD_DEACTIVATE && active) tracker.deactivate("pin-off");
    else if (command === COIOMMU_CMD_PARK_UNPIN && active) tracker.park();
    else if (command === COIOMMU_CMD_UNPARK_UNPIN && active) tracker.unpark();
    else if (command !== COIOMMU_CMD_DEACTIVATE) this.peerErrors++;
  }

  /** Serve the request in a slot, and free the slot whatever comes of it: its CPU spins until then. */
  #serve(slot: number): void {
    const at = slot * CoiommuSlot.size;
    const { data } = CoiommuSlot.read(this.#slots, at);
    if (data === 0n) return;
    try {
      if (data & PIN_PAGES_IN_BATCH) this.#pinBatch(Number(data & ~PIN_PAGES_IN_BATCH));
      else this.#pin(Number(data & 0xffffn), [{ gfn: Number(data >> 16n), nrFrames: 1 }]);
    } catch (error) {
      if (!(error instanceof NotGuestRam)) throw error;
      this.peerErrors++;
    } finally {
      CoiommuSlot.write(this.#slots, { data: 0n }, at);
    }
  }

  #pinBatch(gpa: number): void {
    const { memory } = this.#o;
    const head = new Uint8Array(PinPagesInfo.size);
    memory.read(gpa, head);
    const { bdf, nrPages } = PinPagesInfo.read(head);
    // A list that names no frame twice is no longer than this.
    if (nrPages > memory.size / FRAME_SIZE) {
      this.peerErrors++;
      return;
    }
    const piece = new Uint8Array(PIECE_FRAMES * PFN_SIZE);
    for (let done = 0; done < nrPages; done += PIECE_FRAMES) {
      const count = Math.min(PIECE_FRAMES, nrPages - done);
      memory.read(gpa + PinPagesInfo.size + done * PFN_SIZE, piece.subarray(0, count * PFN_SIZE));
      const frames = Array.from({ length: count }, (_, i) => ({
        gfn: Number(getUint(piece, i * PFN_SIZE, PFN_SIZE)),
        nrFrames: 1,
      }));
      if (!this.#pin(bdf, frames)) return;
    }
  }

  #pin(bdf: number, frames: readonly { gfn: number; nrFrames: number }[]): boolean {
    const { tracker, assigned } = this.#o;
    if (!assigned.has(bdf as Bdf)) {
      this.peerErrors++;
      return false;
    }
    return tracker.pin(frames, bdf) === VIRTIO_IOMMU_S_OK;
  }
}

function configSpace(): Uint8Array<ArrayBuffer> {
  return PciHeader.encode(
    {
      vendorId: PCI_VENDOR_ID_COIOMMU,
      deviceId: PCI_DEVICE_ID_COIOMMU,
      revision: COIOMMU_REVISION_ID,
      baseClass: 0xff, // fits no defined class
    },
    PCI_CONFIG_SIZE - PciHeader.size,
  );
}
