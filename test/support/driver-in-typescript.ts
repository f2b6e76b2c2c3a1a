/** The guest driver in TypeScript as a driver under test. */
import assert from "node:assert/strict";
import { type Bdf, FRAME_SIZE, type Gfn, type Gpa, type Iova } from "../../src/base/units.ts";
import { DRIVER_COUNTERS } from "../../src/driver/counters.ts";
import { DirectDma, TrackedDma } from "../../src/driver/dma.ts";
import { DmaMapFailed } from "../../src/driver/dma-api.ts";
import { FramePool } from "../../src/driver/pages.ts";
import { PinRequests, type PinRequestsOptions } from "../../src/driver/pin-requests.ts";
import { buildTable } from "../../src/driver/table.ts";
import { TrackingUnits } from "../../src/driver/units.ts";
import { counters, countersBuffer } from "../../src/memory/counters.ts";
import { GuestMemory } from "../../src/memory/guest-memory.ts";
import { DmaTrackingTable, NO_UNIT } from "../../src/tracking/dtt.ts";
import { layoutAt } from "../../src/virtio/driver-queue.ts";
import { type Chain, SplitQueue } from "../../src/virtio/queue.ts";
import { TU_PINNED } from "../../src/wire/dtt.ts";
import { ReqTail } from "../../src/wire/virtio-iommu.ts";
import type { Buffers } from "../vectors/driver-case.ts";
import { MACHINE } from "../vectors/driver-cases.ts";
import { ramRegion } from "./guest.ts";
import {
  type DriverUnderTest,
  ENDPOINT,
  type HostAnswer,
  type MapOutcome,
  type SeenRequest,
  statusName,
  type UnitWords,
  type UnmapOutcome,
} from "./run-driver-case.ts";

/** Of the MACHINE's frames only those are there that a case or the driver needs: its first, and its last leaf's. */
const LOW_FRAMES = 2048;
const LEAF_FRAMES = 1024;
const LAST_LEAF = (MACHINE.memoryMiB * 2 ** 20) / FRAME_SIZE - LEAF_FRAMES;
/** Where the guest's allocator takes frames from; no case names one. */
const POOL = { first: 1536 as Gfn, frames: 512 };

/** Broken ones may take their place. */
export interface Parts {
  readonly Units: typeof TrackingUnits;
  readonly Requests: new (options: PinRequestsOptions) => PinRequests;
}

/** The device's side: what it is to answer, and what it has seen. */
class ScriptedHost {
  readonly #memory: GuestMemory;
  readonly #queue: SplitQueue;
  readonly #table: DmaTrackingTable;
  readonly #frames: readonly number[];
  #silenced: Chain | undefined;
  answers: HostAnswer[] = [];
  seen: SeenRequest[] = [];

  constructor(memory: GuestMemory, queue: SplitQueue, table: DmaTrackingTable, frames: readonly number[]) {
    this.#memory = memory;
    this.#queue = queue;
    this.#table = table;
    this.#frames = frames;
  }

  /** The driver notifies again while it waits: then there is no new request. */
  notified(): void {
    const chain = this.#queue.pop();
    if (!chain) return;
    const parts = chain.readable.map(({ gpa, length }) => {
      const bytes = new Uint8Array(length);
      this.#memory.read(gpa, bytes);
      return bytes;
    });
    this.seen.push({ bytes: Buffer.concat(parts), units: this.units() });
    const { pins, reply } = this.answers.shift() ?? { pins: [], reply: "silence" };
    this.#pin(pins);
    if (reply === "silence") this.#silenced = chain;
    else this.#answer(chain, reply);
  }

  late(pins: readonly number[]): void {
    assert.ok(this.#silenced);
    this.#pin(pins);
    this.#answer(this.#silenced, { written: ReqTail.size, status: 0 });
    this.#silenced = undefined;
  }

  units(): UnitWords {
    const named = this.#frames.map((gfn) => [gfn, this.#table.walk(gfn as Gfn)] as const);
    return new Map(
      named
        .filter(([, unit]) => unit !== NO_UNIT)
        .map(([gfn, unit]) => [gfn, this.#memory.load32(unit) >>> 0]),
    );
  }

  setUnit(gfn: number, word: number): void {
    this.#memory.store32(this.#table.walk(gfn as Gfn), word);
  }

  #pin(frames: readonly number[]): void {
    for (const gfn of frames) this.#memory.or32(this.#table.walk(gfn as Gfn), TU_PINNED);
  }

  #answer(chain: Chain, { written, status }: { written: number; status: number }): void {
    const tail = ReqTail.encode({ status }).subarray(0, written);
    this.#memory.write(chain.writable[0]!.gpa, tail);
    this.#queue.push(chain.head, written);
  }
}

export class DriverInTypeScript implements DriverUnderTest {
  readonly #parts: Parts;
  readonly #counters = counters(DRIVER_COUNTERS, countersBuffer(DRIVER_COUNTERS));
  #host!: ScriptedHost;
  #requests!: PinRequests;
  #dma!: TrackedDma;

  constructor(parts: Parts = { Units: TrackingUnits, Requests: PinRequests }) {
    this.#parts = parts;
  }

  reset(batchMax: number, frames: readonly number[], pinDirty: boolean): void {
    const regions = [ramRegion(0, LOW_FRAMES), ramRegion(LAST_LEAF * FRAME_SIZE, LEAF_FRAMES)];
    const memory = new GuestMemory(regions);
    const pages = new FramePool(memory, POOL.first, POOL.frames);
    const table = buildTable(memory, pages);
    const queue = layoutAt(pages.allocate(1)!, 8);
    const units = new this.#parts.Units(memory, table, MACHINE.cpus, pinDirty);
    const tracking = new DmaTrackingTable(memory, table.root, table.levels);
    const host = new ScriptedHost(
      memory,
      new SplitQueue(memory, queue, { indirect: false }),
      tracking,
      frames,
    );
    this.#host = host;
    this.#requests = new this.#parts.Requests({
      ...{ memory, units, queue, page: pages.allocate(1)!, rangesMax: batchMax, counters: this.#counters },
      cpu: { waitFor: (done) => done() },
      notify: () => host.notified(),
    });
    this.#requests.setUp();
    this.#requests.enable(true);
    this.#dma = new TrackedDma({
      ...{ direct: new DirectDma(pages), units, requests: this.#requests, counters: this.#counters },
      endpoint: ENDPOINT as Bdf,
    });
  }

  setUnit(gfn: number, word: number): void {
    this.#host.setUnit(gfn, word);
  }

  units(): UnitWords {
    return this.#host.units();
  }

  late(pins: readonly number[]): void {
    this.#host.late(pins);
  }

  device(on: boolean): void {
    this.#requests.enable(on);
  }

  map(buffers: Buffers, answers: readonly HostAnswer[]): MapOutcome {
    this.#host.answers = [...answers];
    this.#host.seen = [];
    const result = this.#map(buffers);
    return { result, requests: this.#host.seen };
  }

  unmap({ kind, pieces, direction = "bidirectional" }: Buffers): UnmapOutcome {
    const before = { ...this.#counters };
    const list = pieces.map(([gfn, offset, length]) => ({
      iova: (gfn * FRAME_SIZE + offset) as Iova,
      length,
    }));
    if (kind === "sg") this.#dma.unmapSg(list, direction);
    else this.#dma.unmapSingle(list[0]!.iova, list[0]!.length, direction);
    return {
      counted: this.#counters.framesUnmapped - before.framesUnmapped,
      reported: this.#counters.underflow - before.underflow,
    };
  }

  #map({ kind, pieces, direction = "bidirectional" }: Buffers): string {
    const list = pieces.map(([gfn, offset, length]) => ({ gpa: (gfn * FRAME_SIZE + offset) as Gpa, length }));
    try {
      if (kind === "sg") this.#dma.mapSg(list, direction);
      else this.#dma.mapSingle(list[0]!.gpa, list[0]!.length, direction);
      return "mapped";
    } catch (error) {
      if (!(error instanceof DmaMapFailed)) throw error;
      return error.status === undefined ? error.reason : `${error.reason} ${statusName(error.status)}`;
    }
  }
}
