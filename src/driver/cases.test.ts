/** The driver does what the case table says, as guest/linux does (test/vm/driver-cases.test.ts); broken ones do not. */
import assert from "node:assert/strict";
import test from "node:test";
import { ramRegion } from "../../test/support/guest.ts";
import {
  type DriverUnderTest,
  ENDPOINT,
  firstDifference,
  type HostAnswer,
  type MapOutcome,
  type SeenRequest,
  statusName,
  type UnitWords,
  type UnmapOutcome,
} from "../../test/support/run-driver-case.ts";
import type { Buffers } from "../../test/vectors/driver-case.ts";
import { CASES, MACHINE } from "../../test/vectors/driver-cases.ts";
import { type Bdf, FRAME_SIZE, type Gfn, type Gpa, type Iova } from "../base/units.ts";
import { counters, countersBuffer } from "../memory/counters.ts";
import { GuestMemory } from "../memory/guest-memory.ts";
import { DmaTrackingTable, NO_UNIT } from "../tracking/dtt.ts";
import { layoutAt } from "../virtio/driver-queue.ts";
import { type Chain, SplitQueue } from "../virtio/queue.ts";
import { TU_PINNED } from "../wire/dtt.ts";
import { ReqTail } from "../wire/virtio-iommu.ts";
import { DRIVER_COUNTERS } from "./counters.ts";
import { DirectDma, TrackedDma } from "./dma.ts";
import { DmaMapFailed } from "./dma-api.ts";
import { FramePool } from "./pages.ts";
import { type FrameRange, PinRequests, type PinRequestsOptions } from "./pin-requests.ts";
import { buildTable } from "./table.ts";
import { TrackingUnits } from "./units.ts";

/** Of the MACHINE's frames only those are there that a case or the driver needs: its first, and its last leaf's. */
const LOW_FRAMES = 2048;
const LEAF_FRAMES = 1024;
const LAST_LEAF = (MACHINE.memoryMiB * 2 ** 20) / FRAME_SIZE - LEAF_FRAMES;
/** Where the guest's allocator takes frames from; no case names one. */
const POOL = { first: 1536 as Gfn, frames: 512 };

interface Parts {
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

class DriverInTypeScript implements DriverUnderTest {
  readonly #parts: Parts;
  readonly #counters = counters(DRIVER_COUNTERS, countersBuffer(DRIVER_COUNTERS));
  #host!: ScriptedHost;
  #requests!: PinRequests;
  #dma!: TrackedDma;

  constructor(parts: Parts = { Units: TrackingUnits, Requests: PinRequests }) {
    this.#parts = parts;
  }

  reset(batchMax: number, frames: readonly number[]): void {
    const regions = [ramRegion(0, LOW_FRAMES), ramRegion(LAST_LEAF * FRAME_SIZE, LEAF_FRAMES)];
    const memory = new GuestMemory(regions);
    const pages = new FramePool(memory, POOL.first, POOL.frames);
    const table = buildTable(memory, pages);
    const queue = layoutAt(pages.allocate(1)!, 8);
    const units = new this.#parts.Units(memory, table, MACHINE.cpus);
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

  unmap({ kind, pieces }: Buffers): UnmapOutcome {
    const before = { ...this.#counters };
    const list = pieces.map(([gfn, offset, length]) => ({
      iova: (gfn * FRAME_SIZE + offset) as Iova,
      length,
    }));
    if (kind === "sg") this.#dma.unmapSg(list, "bidirectional");
    else this.#dma.unmapSingle(list[0]!.iova, list[0]!.length, "bidirectional");
    return {
      counted: this.#counters.framesUnmapped - before.framesUnmapped,
      reported: this.#counters.underflow - before.underflow,
    };
  }

  #map({ kind, pieces }: Buffers): string {
    const list = pieces.map(([gfn, offset, length]) => ({ gpa: (gfn * FRAME_SIZE + offset) as Gpa, length }));
    try {
      if (kind === "sg") this.#dma.mapSg(list, "bidirectional");
      else this.#dma.mapSingle(list[0]!.gpa, list[0]!.length, "bidirectional");
      return "mapped";
    } catch (error) {
      if (!(error instanceof DmaMapFailed)) throw error;
      return error.status === undefined ? error.reason : `${error.reason} ${statusName(error.status)}`;
    }
  }
}

for (const tested of CASES)
  test(`driver case: ${tested.name}`, async () =>
    assert.equal(await firstDifference(new DriverInTypeScript(), tested), undefined));

class NeverUncounts extends TrackingUnits {
  override put(_gfn: number, nr: number): number {
    return nr;
  }
}
class KeepsNoRoomForCpus extends TrackingUnits {
  constructor(...[memory, table]: ConstructorParameters<typeof TrackingUnits>) {
    super(memory, table, 0);
  }
}
class CountsWhatIsPinned extends TrackingUnits {
  override get(gfn: number, nr: number) {
    return this.pinned(gfn) ? super.get(gfn, nr) : "ask";
  }
}
class CountsWhenAnswered extends PinRequests {
  readonly #units: TrackingUnits;
  constructor(options: PinRequestsOptions) {
    super(options);
    this.#units = options.units;
  }
  override pin(endpoint: Bdf, ranges: Iterable<FrameRange>): void {
    super.pin(endpoint, ranges);
    for (const [gfn, nr] of ranges) TrackingUnits.prototype.get.call(this.#units, gfn, nr);
  }
}
class AsksFrameByFrame extends PinRequests {
  override pin(endpoint: Bdf, ranges: Iterable<FrameRange>): void {
    for (const [first, nr] of ranges)
      for (let gfn = first; gfn < first + nr; gfn++) super.pin(endpoint, [[gfn, 1]]);
  }
}
class IgnoresTheBatchLimit extends PinRequests {
  constructor(options: PinRequestsOptions) {
    super({ ...options, rangesMax: 99 });
  }
}
class ForgetsLost extends PinRequests {
  override pin(endpoint: Bdf, ranges: Iterable<FrameRange>): void {
    this.forgetLost();
    super.pin(endpoint, ranges);
  }
}

const TWINS: Readonly<Record<string, Partial<Parts>>> = {
  "never counts down": { Units: NeverUncounts },
  "keeps no room in COUNT for other CPUs": { Units: KeepsNoRoomForCpus },
  "asks before it counts": { Units: CountsWhatIsPinned, Requests: CountsWhenAnswered },
  "asks frame by frame": { Requests: AsksFrameByFrame },
  "asks for more ranges than the device takes": { Requests: IgnoresTheBatchLimit },
  "asks while a request is lost": { Requests: ForgetsLost },
};
for (const [what, parts] of Object.entries(TWINS))
  test(`the case table finds a driver that ${what}`, async (t) => {
    const driver = new DriverInTypeScript({ Units: TrackingUnits, Requests: PinRequests, ...parts });
    const all = await Promise.all(CASES.map((tested) => firstDifference(driver, tested)));
    const first = all.find((difference) => difference !== undefined);
    assert.ok(first);
    t.diagnostic(first);
  });
