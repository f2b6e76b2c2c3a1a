import { invariant } from "../../base/errors.ts";
import { type Bdf, milliseconds, type Nanoseconds } from "../../base/units.ts";
import { GENERATOR, type NicSetup } from "../../device/nic.ts";
import type { NicPort } from "../../driver/nic.ts";
import { NvmeQueue } from "../../driver/nvme.ts";
import { type NvmeIdentity, nvmePort } from "../../driver/nvme-controller.ts";
import type { NvmePort } from "../../driver/nvme-rings.ts";
import { SharedMapping } from "../../host/mapping.ts";
import type { MappedBar } from "../../host/vfio-function.ts";
import { Bell } from "../../memory/bell.ts";
import { MmioRegisters } from "../../memory/mmio.ts";
import type { FioWorkload, GpuWorkload as GpuText, NicWorkload as NicText } from "../workload-text.ts";
import {
  completionHead,
  type DeviceSetup,
  GPU_TAIL,
  NIC_RECEIVE,
  NIC_STOP,
  NIC_STOPPED,
  NIC_TRANSMIT,
  submissionTail,
} from "./device.ts";
import { Doorbells } from "./doorbells.ts";
import { BlockWorkload } from "./workloads/block.ts";
import { GpuWorkload } from "./workloads/gpu.ts";
import { Latencies } from "./workloads/latencies.ts";
import { NicWorkload } from "./workloads/nic.ts";
import { type Guest, type GuestWorkload, measurement } from "./workloads/workload.ts";

/** How a CPU reaches its device: a model in another thread, or the registers of a real disk, which it polls. */
export type DeviceLink = { readonly endpoint: Bdf } & (
  | { readonly bell: SharedArrayBuffer; readonly doorbells: SharedArrayBuffer }
  | { readonly bar: MappedBar }
);

/** What one CPU does for a workload. */
export type LoadSpec =
  | {
      readonly name: "idle";
      readonly seconds: number;
      readonly queue: number;
      readonly disk?: NvmeIdentity | undefined;
    }
  | {
      readonly name: "fio";
      readonly fio: FioWorkload;
      readonly queue: number;
      /** What a real disk is. */
      readonly disk?: NvmeIdentity | undefined;
      readonly readOnly: boolean;
      readonly region: { readonly start: number; readonly size: number };
      /** Frames that buffers may lie in. */
      readonly cacheFrames: number;
    }
  | { readonly name: "nic"; readonly nic: NicText; readonly cacheFrames: number }
  | { readonly name: "gpu"; readonly gpu: GpuText };

/** A workload, and what its device is to be told before it may begin. */
export interface Load {
  readonly workload: GuestWorkload;
  readonly setup: DeviceSetup;
  /** So long it may be without progress. */
  readonly patience: Nanoseconds;
  /** The workload has finished, and the device does not know its rings any more. */
  close(): void;
}

const PATIENCE = milliseconds(10_000);
/** As many as common drivers take: Linux's e1000e has 256. */
const NIC_RING = 256;
const GPU_RING = 64;
const IDLE_QUEUE = 32;

export function createLoad(spec: LoadSpec, link: DeviceLink, guest: Guest): Load {
  switch (spec.name) {
    case "idle": {
      const { queue: id, seconds, disk } = spec;
      const size = Math.min(IDLE_QUEUE, disk?.queueSizeMax ?? IDLE_QUEUE);
      const queue = new NvmeQueue({ ...guest, port: diskPort(link, disk), id, size });
      return diskLoad(id, queue, new Idle(guest, seconds), milliseconds(Number.POSITIVE_INFINITY));
    }
    case "fio": {
      const { queue, fio: workload, disk, ...rest } = spec;
      const block = new BlockWorkload({ ...rest, guest, port: diskPort(link, disk), queue, workload, disk });
      return diskLoad(queue, block.queue, block, PATIENCE);
    }
    case "nic":
      return nicLoad(spec.nic, spec.cacheFrames, nicPort(doorbellsOf(link)), guest);
    case "gpu": {
      const doorbells = doorbellsOf(link);
      const port = { submit: (tail: number) => doorbells.write(GPU_TAIL, tail) };
      const workload = new GpuWorkload({ guest, port, workload: spec.gpu, ringSize: GPU_RING });
      const { ring, table, pages } = workload.driver;
      const setup = { ring: { iova: ring.iova, size: GPU_RING }, table, pages };
      return { workload, setup: { kind: "gpu", setup }, patience: PATIENCE, close: () => {} };
    }
  }
}

function nicLoad(nic: NicText, cacheFrames: number, port: NicPort, guest: Guest): Load {
  const receives = nic.traffic === "receive";
  const sender = receives ? GENERATOR : GENERATOR + 1;
  const rings = { ringSize: NIC_RING, cacheFrames };
  const workload = new NicWorkload({ guest, port, workload: nic, sender, ...rings });
  const { receiver, transmitter, buffers } = workload;
  const setup: NicSetup = {
    receive: { iova: receiver.ring.iova, size: NIC_RING },
    transmit: { iova: transmitter.ring.iova, size: NIC_RING },
    bufferSize: buffers.size,
    source: receives ? { length: nic.size } : "loopback",
  };
  return { workload, setup: { kind: "nic", setup }, patience: PATIENCE, close: () => {} };
}

function diskLoad(id: number, queue: NvmeQueue, workload: GuestWorkload, patience: Nanoseconds): Load {
  const { submission, completion, size } = queue.rings;
  const setup: DeviceSetup = { kind: "disk", queue: id, layout: { submission, completion, size } };
  return { workload, setup, patience, close: () => queue.close() };
}

/** `disk`: what a real one is. */
function diskPort(link: DeviceLink, disk: NvmeIdentity | undefined): NvmePort {
  if ("bar" in link && disk) return nvmePort(registersOf(link.bar), disk.doorbellStride);
  const doorbells = doorbellsOf(link);
  return {
    submit: (queue, tail) => doorbells.write(submissionTail(queue), tail),
    complete: (queue, head) => doorbells.write(completionHead(queue), head),
  };
}

export const registersOf = (bar: MappedBar): MmioRegisters => new MmioRegisters(SharedMapping.bytes(bar));

function doorbellsOf(link: DeviceLink): Doorbells {
  invariant("doorbells" in link, "the device is a model");
  return new Doorbells(link.doorbells, new Bell(link.bell));
}

const nicPort = (doorbells: Doorbells): NicPort => ({
  receive: (tail) => doorbells.write(NIC_RECEIVE, tail),
  transmit: (tail) => doorbells.write(NIC_TRANSMIT, tail),
  stop: () => doorbells.write(NIC_STOP, 1),
  get stopped() {
    return doorbells.read(NIC_STOPPED) === 1;
  },
});

/** What leaves a disk alone whose driver runs. */
class Idle implements GuestWorkload {
  readonly measurement = measurement(new Latencies());
  readonly #guest: Guest;
  #end: number;
  finished = false;

  constructor(guest: Guest, seconds: number) {
    this.#guest = guest;
    this.#end = guest.clock.now() + seconds * 1e9;
  }

  poll(): boolean {
    if (this.#guest.clock.now() < this.#end) return false;
    this.finished = true;
    return true;
  }

  stop(): void {
    this.#end = 0;
  }
}
