import { Nic, type NicSetup } from "../../src/device/nic.ts";
import { FrameCache } from "../../src/driver/frames.ts";
import { Receiver, Transmitter } from "../../src/driver/nic.ts";
import { type ReceiveMode, receiveBuffers } from "../../src/driver/receive-buffers.ts";
import { GatedMemory } from "../../src/memory/gated-memory.ts";
import type { GuestAccess, GuestMemory } from "../../src/memory/guest-memory.ts";
import { TestDma, TestPages } from "./dma.ts";
import { ram } from "./guest.ts";
import { zeroCounters } from "./nvme.ts";
import { random } from "./random.ts";

export interface NicRigOptions {
  readonly mode: ReceiveMode;
  readonly source: NicSetup["source"];
  readonly size?: number;
  /** Frames that the allocator has: those behind them are the test's. */
  readonly allocatable?: number;
  readonly Dma?: typeof TestDma;
  /** The device's memory, given that of the IOMMU. */
  readonly access?: (gated: GuestAccess) => GuestAccess;
}

export interface NicParts {
  readonly memory: GuestMemory;
  readonly pages: TestPages;
  readonly dma: TestDma;
  readonly frames: FrameCache;
  readonly counters: ReturnType<typeof zeroCounters>;
  readonly nic: Nic;
}

/** A controller behind an IOMMU that maps what the driver mapped, and what a driver needs. */
export function nicParts({
  allocatable = 4096,
  Dma = TestDma,
  access = (gated) => gated,
}: Partial<NicRigOptions> = {}): NicParts {
  const memory = ram(4096);
  const pages = new TestPages(memory, 16, allocatable - 16);
  const dma = new Dma(pages);
  const frames = new FrameCache(pages, 512, random(3));
  const counters = zeroCounters();
  const nic = new Nic(access(new GatedMemory(memory, dma.gate)), counters);
  return { memory, pages, dma, frames, counters, nic };
}

/** The same with its driver. `received`: each packet's bytes, or undefined for a lost one. */
export function nicRig(options: NicRigOptions) {
  const parts = nicParts({ allocatable: 0x700, ...options });
  const { memory, dma, frames, nic } = parts;
  const received: (Uint8Array | undefined)[] = [];
  const size = options.size ?? 8;
  const buffers = receiveBuffers(options.mode, dma, frames);
  const ring = { memory, dma, port: nic, size };
  const receiver = new Receiver({ ...ring, buffers, received: (packet) => received.push(packet?.slice()) });
  const transmitter = new Transmitter(ring);
  nic.start({
    receive: receiver.ring,
    transmit: transmitter.ring,
    bufferSize: buffers.size,
    source: options.source,
  });
  const close = () => {
    nic.stop();
    transmitter.close();
    receiver.close();
  };
  return { ...parts, received, receiver, transmitter, close };
}
