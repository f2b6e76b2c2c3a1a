import { type Bdf, milliseconds, type Nanoseconds } from "../../base/units.ts";
import { GENERATOR, type NicSetup } from "../../device/nic.ts";
import type { NicPort } from "../../driver/nic.ts";
import { NvmeQueue } from "../../driver/nvme.ts";
import type { NvmePort } from "../../driver/nvme-rings.ts";
import { Bell } from "../../memory/bell.ts";
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

/** How a CPU reaches its device. */
export interface DeviceLink {
  readonly endpoint: Bdf;
  readonly bell: SharedArrayBuffer;
  readonly doorbells: SharedArrayBuffer;
}

/** What one CPU does for a workload. */
export type LoadSpec =
  | { readonly name: "idle"; readonly seconds: number; readonly queue: number }
  | {
      readonly name: "fio";
      readonly fio: FioWorkload;
      readonly queue: number;
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
}

const PATIENCE = milliseconds(10_000);
/** As many as common drivers take: Linux's e1000e has 256. */
const NIC_RING = 256;
const GPU_RING = 64;
const IDLE_QUEUE = 32;

export function createLoad(spec: LoadSpec, link: DeviceLink, guest: Guest): Load {
  const doorbells = new Doorbells(link.doorbells, new Bell(link.bell));
  switch (spec.name) {
    case "idle": {
      const { queue: id, seconds } = spec;
      const queue = new NvmeQueue({ ...guest, port: nvmePort(doorbells), id, size: IDLE_QUEUE });
      const workload = new Idle(guest, queue, seconds);
      return { workload, setup: diskSetup(id, queue), patience: milliseconds(Number.POSITIVE_INFINITY) };
    }
    case "fio": {
      const { queue, region, fio, cacheFrames } = spec;
      const port = nvmePort(doorbells);
      const workload = new BlockWorkload({ guest, port, queue, workload: fio, region, cacheFrames });
      return { workload, setup: diskSetup(queue, workload.queue), patience: PATIENCE };
    }
    case "nic":
      return nicLoad(spec.nic, spec.cacheFrames, nicPort(doorbells), guest);
    case "gpu": {
      const port = { submit: (tail: number) => doorbells.write(GPU_TAIL, tail) };
      const workload = new GpuWorkload({ guest, port, workload: spec.gpu, ringSize: GPU_RING });
      const { ring, table, pages } = workload.driver;
      const setup = { ring: { iova: ring.iova, size: GPU_RING }, table, pages };
      return { workload, setup: { kind: "gpu", setup }, patience: PATIENCE };
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
  return { workload, setup: { kind: "nic", setup }, patience: PATIENCE };
}

const diskSetup = (queue: number, { rings: { submission, completion, size } }: NvmeQueue): DeviceSetup => ({
  ...{ kind: "disk", queue, layout: { submission, completion, size } },
});

const nvmePort = (doorbells: Doorbells): NvmePort => ({
  submit: (queue, tail) => doorbells.write(submissionTail(queue), tail),
  complete: (queue, head) => doorbells.write(completionHead(queue), head),
});

const nicPort = (doorbells: Doorbells): NicPort => ({
  receive: (tail) => doorbells.write(NIC_RECEIVE, tail),
  transmit: (tail) => doorbells.write(NIC_TRANSMIT, tail),
  stop: () => doorbells.write(NIC_STOP, 1),
  get stopped() {
    return doorbells.read(NIC_STOPPED) === 1;
  },
});

/** A disk whose driver runs, and that nobody uses. */
class Idle implements GuestWorkload {
  readonly measurement = measurement(new Latencies());
  readonly #guest: Guest;
  readonly #queue: NvmeQueue;
  #end: number;
  finished = false;

  constructor(guest: Guest, queue: NvmeQueue, seconds: number) {
    this.#guest = guest;
    this.#queue = queue;
    this.#end = guest.clock.now() + seconds * 1e9;
  }

  poll(): boolean {
    if (this.#guest.clock.now() < this.#end) return false;
    this.#queue.close();
    this.finished = true;
    return true;
  }

  stop(): void {
    this.#end = 0;
  }
}
