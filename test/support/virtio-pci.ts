import assert from "node:assert/strict";
import { ProtocolError } from "../../src/base/errors.ts";
import type { GuestMemory } from "../../src/memory/guest-memory.ts";
import type { VirtioDevice } from "../../src/virtio/device.ts";
import { DriverQueue, layoutAt } from "../../src/virtio/driver-queue.ts";
import { VirtioPciFunction } from "../../src/virtio/pci.ts";
import type { SplitQueue } from "../../src/virtio/queue.ts";
import { VirtioPciCommonCfg } from "../../src/wire/pci.ts";
import { ram } from "./guest.ts";

export const VERSION_1 = 1n << 32n;
export const FEATURES = VERSION_1 | (1n << 63n) | 0b111n;
export const NEEDS_RESET = 64;

/** A device that answers each chain with its length, and remembers what the transport did to it. */
class EchoDevice implements VirtioDevice {
  readonly id = 23;
  readonly features = FEATURES;
  readonly queueSizes = [64, 16];
  readonly configSize = 12;
  configGeneration = 0;
  readonly config = Uint8Array.from({ length: 12 }, (_, i) => 0xa0 + i);
  readonly log: string[] = [];
  /** Bit 1 is acceptable with bit 0 only. */
  accepts(features: bigint): boolean {
    return (features & 0b11n) !== 0b10n;
  }
  start(features: bigint): void {
    this.log.push(`start ${features.toString(16)}`);
  }
  configRead(offset: number, into: Uint8Array): void {
    into.set(this.config.subarray(offset, offset + into.length));
  }
  configWrite(offset: number, from: Uint8Array): void {
    this.config.set(from, offset);
  }
  kick(index: number, queue: SplitQueue): void {
    this.log.push(`kick ${index}`);
    for (let chain = queue.pop(); chain; chain = queue.pop()) {
      if (chain.readable[0]?.length === 666) throw new ProtocolError("cannot go on");
      if (chain.readable[0]?.length === 667) throw new RangeError("a bug of the device");
      queue.push(chain.head, chain.readable.length);
    }
  }
  reset(): void {
    this.log.push("reset");
  }
  machineReset(): void {
    this.log.push("machine reset");
  }
}

export const BAR = 0xfebf_0000;
export type CommonField = keyof typeof VirtioPciCommonCfg.fields;

/** What a driver does with the function: Linux's virtio_pci_modern, abridged. */
export function plugged(memory: GuestMemory = ram(64)) {
  const device = new EchoDevice();
  const pci = new VirtioPciFunction(device, memory);
  device.log.length = 0;
  pci.configWrite(0x10, 4, BAR);
  pci.configWrite(0x04, 2, 6);
  const field = (name: CommonField) => VirtioPciCommonCfg.fields[name];
  const read = (name: CommonField) => pci.barRead(BAR + field(name).at, field(name).size);
  const write = (name: CommonField, value: number | bigint) =>
    pci.barWrite(BAR + field(name).at, field(name).size, BigInt(value));
  return {
    device,
    pci,
    memory,
    read,
    write,
    /** 64 bits in two 32-bit halves, low first. */
    write64(name: CommonField, value: number): void {
      pci.barWrite(BAR + field(name).at, 4, BigInt(value % 2 ** 32));
      pci.barWrite(BAR + field(name).at + 4, 4, BigInt(Math.floor(value / 2 ** 32)));
    },
    status: () => Number(read("deviceStatus")),
    /** From reset to FEATURES_OK; returns the status after it. */
    negotiate(features: bigint): number {
      for (const status of [0, 1, 3]) write("deviceStatus", status);
      for (const [half, shift] of [
        [0, 0n],
        [1, 32n],
      ] as const) {
        write("driverFeatureSelect", half);
        write("driverFeature", (features >> shift) & 0xffff_ffffn);
      }
      write("deviceStatus", 11);
      return Number(read("deviceStatus"));
    },
    enableQueue(index: number, gpa: number, size = 8): DriverQueue {
      const layout = layoutAt(gpa, size);
      write("queueSelect", index);
      write("queueSize", size);
      this.write64("queueDesc", layout.desc);
      this.write64("queueDriver", layout.driver);
      this.write64("queueDevice", layout.device);
      write("queueEnable", 1);
      return new DriverQueue(memory, layout);
    },
    notify: (index: number) => pci.barWrite(BAR + 0x3000 + 4 * index, 2, BigInt(index)),
  };
}

/** A driver that came as far as DRIVER_OK, with queue 0. */
export function running() {
  const rig = plugged();
  assert.equal(rig.negotiate(VERSION_1 | 1n), 11);
  const queue = rig.enableQueue(0, 0x1000);
  rig.write("deviceStatus", 15);
  return { ...rig, queue };
}
