/**
 * An NVMe function in a thread of its own, which finds what a driver writes in its registers by looking at them. Its DMA
 * goes through the software IOMMU, so that one to a frame that is not pinned is a fault.
 */
import { parentPort, workerData } from "node:worker_threads";
import { MemoryStore } from "../../src/device/block-store.ts";
import { SharedMapping } from "../../src/host/mapping.ts";
import { type GuestRam, ramRegions } from "../../src/machine/embedded/ram.ts";
import { Bell } from "../../src/memory/bell.ts";
import { GatedMemory } from "../../src/memory/gated-memory.ts";
import { GuestMemory } from "../../src/memory/guest-memory.ts";
import { MmioRegisters } from "../../src/memory/mmio.ts";
import { DeviceGate } from "../../src/tracking/software-iommu.ts";
import { NvmeProperties } from "../../src/wire/nvme-admin.ts";
import { NvmeModel } from "../support/nvme-controller.ts";

export interface NvmeFunctionData {
  readonly bar: { readonly address: number; readonly size: number };
  readonly ram: GuestRam;
  readonly iommu: SharedArrayBuffer;
  /** Rung to end it. It says "ready", and at its end NvmeFunctionEnd. */
  readonly bell: SharedArrayBuffer;
  /** Reads move nothing from this one on: what a DMA that an IOMMU blocks looks like. */
  readonly blindAfter: number;
}
export interface NvmeFunctionEnd {
  readonly complaints: readonly string[];
  readonly faults: number;
  readonly bytes: number;
}

const AT = NvmeProperties.fields;
const DOORBELLS = 0x1000;

class Blind extends MemoryStore {
  reads = 0;
  override read(position: number, into: Uint8Array): void {
    if (this.reads++ < (workerData as NvmeFunctionData).blindAfter) super.read(position, into);
  }
}

function serve({ bar, ram, iommu, bell: buffer }: NvmeFunctionData): NvmeFunctionEnd {
  const registers = new MmioRegisters(SharedMapping.bytes(bar));
  const gate = new DeviceGate(iommu, 0, () => {});
  const model = new NvmeModel(new GatedMemory(new GuestMemory(ramRegions(ram)), gate), new Blind(2 ** 15));
  const seen = new Map<number, number>();
  const changed = (at: number) => {
    const value = registers.load32(at);
    if (value === (seen.get(at) ?? 0)) return;
    seen.set(at, value);
    model.store32(at, value);
  };
  for (const at of [AT.capLow.at, AT.capHigh.at]) registers.store32(at, model.load32(at));
  const bell = new Bell(buffer);
  parentPort!.postMessage("ready");
  while (bell.rings === 0) {
    if (model.csts === 0)
      for (const at of [AT.aqa.at, AT.asq.at, AT.asq.at + 4, AT.acq.at, AT.acq.at + 4]) changed(at);
    changed(AT.cc.at);
    if (model.csts & 1)
      for (let queue = 0; queue <= model.queuePairs; queue++) {
        changed(DOORBELLS + 8 * queue);
        changed(DOORBELLS + 8 * queue + 4);
      }
    else for (let at = DOORBELLS; at < DOORBELLS + 64; at += 4) seen.delete(at);
    if (registers.load32(AT.csts.at) !== model.csts) registers.store32(AT.csts.at, model.csts);
    if (model.pairs.run(8).completed === 0) bell.sleep(0, 0.05);
  }
  return { complaints: model.complaints, faults: model.counters.faults, bytes: model.counters.bytes };
}

if (parentPort) parentPort.postMessage(serve(workerData as NvmeFunctionData));
