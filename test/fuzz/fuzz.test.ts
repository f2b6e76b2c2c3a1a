import assert from "node:assert/strict";
import test from "node:test";
import { FRAME_SIZE, type Gfn } from "../../src/base/units.ts";
import { GuestMemory } from "../../src/memory/guest-memory.ts";
import { createSpeculation } from "../../src/policy/speculation/registry.ts";
import type { TrackingCounters } from "../../src/tracking/counters.ts";
import { DmaTrackingTable, type Unit } from "../../src/tracking/dtt.ts";
import type { Fault, FaultLog } from "../../src/tracking/faults.ts";
import { SoftwareIommu } from "../../src/tracking/software-iommu.ts";
import { Speculator, type SpeculatorOptions } from "../../src/tracking/speculator.ts";
import { Tracker, type TrackerOptions } from "../../src/tracking/tracker.ts";
import { HOST_BASE } from "../support/guest.ts";
import { corpusOf } from "./corpus.ts";
import type { DeviceParts } from "./device.ts";
import { type Finding, fuzz, type Target } from "./fuzzer.ts";
import { crosvmTarget, mpqemuTarget } from "./mpqemu.ts";
import { deviceTarget, targets } from "./targets.ts";
import { vhostUserTarget } from "./vhost-user.ts";
import { watched } from "./watchdog.ts";

const SECONDS = 3;
const seed = Math.floor(Math.random() * 2 ** 31);

for (const target of targets)
  test(`${target.name}: nothing is wrong with the corpus, nor with what ${SECONDS} s make of it`, async () => {
    const corpus = corpusOf(target.name);
    const safe = await watched(target);
    const { finding, inputs } = fuzz(safe, { limit: { seconds: SECONDS }, seed, corpus });
    safe.close();
    const hex = Buffer.from(finding?.input ?? []).toString("hex");
    assert.equal(finding, undefined, `seed ${seed}: ${hex}: ${finding?.error.stack}`);
    assert.ok(inputs > corpus.length);
  });

// --- broken twins --------------------------------------------------------------

/** Takes 16 frames behind the driver's memory for RAM. */
class Credulous extends GuestMemory {
  override find(gpa: number, length: number) {
    const real = super.find(gpa, length);
    const [first] = this.regions;
    return real ?? (first?.gpa === 0 && gpa + length <= 32 * FRAME_SIZE ? first : undefined);
  }
  override hostAddress(gpa: number): number {
    return HOST_BASE + gpa;
  }
}

class NeverRevokes extends SoftwareIommu {
  override revoke(_gfn: Gfn): void {}
}

type Report = (fault: Fault) => boolean;

/** An IOMMU whose faults are told of as `tell` has it. */
const telling = (tell: (report: Report) => Report) =>
  class extends SoftwareIommu {
    override faultLog(counters: TrackingCounters): FaultLog {
      const log = super.faultLog(counters);
      const { serve } = log;
      log.serve = (report) => serve.call(log, tell(report));
      return log;
    }
  };
const RepeatsFaults = telling((report) => (fault) => report(fault) && report(fault));
const MovesFaults = telling((report) => (fault) => report({ ...fault, address: fault.address + 1 }));

class KeepsP extends DmaTrackingTable {
  override claimForUnpin(unit: Unit): ReturnType<DmaTrackingTable["claimForUnpin"]> {
    const outcome = super.claimForUnpin(unit);
    if (outcome === "claimed") this.setPinned(unit);
    return outcome;
  }
}

class HastyTracker extends Tracker {
  readonly memory: GuestMemory;
  constructor(options: TrackerOptions) {
    super(options);
    this.memory = options.memory;
  }
  override activate(...args: Parameters<Tracker["activate"]>): boolean {
    this.memory.read(args[0], new Uint8Array(4));
    return super.activate(...args);
  }
}

/** What the host refuses is said to be pinned. */
function showsFirst(o: SpeculatorOptions): Speculator {
  const pinPresent = o.pins.pinPresent.bind(o.pins);
  o.pins.pinPresent = (gfns, generation) => {
    for (const gfn of gfns) o.table.show(gfn);
    pinPresent(gfns, generation);
  };
  return new Speculator(o);
}

const device = (parts: DeviceParts) => deviceTarget(parts);
const twins: [what: string, target: Target, message: RegExp, bytesMax?: number][] = [
  ["a device that pins what is not RAM", device({ memory: Credulous }), /which is not guest RAM/],
  [
    "a device without a quota",
    device({ tracker: { quota: Number.POSITIVE_INFINITY } }),
    /than the quota allows/,
  ],
  [
    "a device that pins unasked above its quota",
    device({
      tracker: {
        speculation: createSpeculation("neighbours"),
        makeSpeculator: (o) => new Speculator({ ...o, room: () => Number.POSITIVE_INFINITY }),
      },
    }),
    /than the quota allows/,
  ],
  [
    "a device that shows P and pins then",
    device({ tracker: { speculation: createSpeculation("neighbours"), makeSpeculator: showsFirst } }),
    /has P/,
  ],
  [
    "a device that leaves what it unpins in the IOMMU",
    device({ iommu: NeverRevokes }),
    /the host has not pinned|is not RAM|pins of no frame/,
  ],
  [
    "a device that leaves P set when it unpins",
    device({ tracker: { openTable: (...a) => new KeepsP(...a) } }),
    /has P/,
  ],
  ["a device that reports a fault twice", device({ iommu: RepeatsFaults }), /2 faults are reported/],
  ["a device that reports a fault elsewhere", device({ iommu: MovesFaults }), /is reported that was not/],
  ["an mpqemu server that closes one fd of a message", mpqemuTarget({ leaks: true }), /an fd is left open/],
  // RAM, a table and three pins, each a message or two: about 650 bytes, and what is left over of a batch.
  [
    "a crosvm-compatible function without a quota",
    crosvmTarget({ quota: Number.POSITIVE_INFINITY }),
    /than the quota allows/,
    1024,
  ],
  [
    "a crosvm-compatible function that reads a table before it is checked",
    crosvmTarget({ Tracker: HastyTracker }),
    /a guest ends its VM/,
  ],
  ["a vhost-user session that keeps its fds", vhostUserTarget(true), /an fd is left open/],
];
for (const [what, target, message, bytesMax = 160] of twins)
  test(`broken twin: ${what} is found from nothing, and the input made small`, (t) => {
    let inputs = 0;
    let finding: Finding | undefined;
    // What V8 says of coverage depends on when it compiles: a run can get stuck, and then another one is quicker.
    for (let seed = 1; !finding && seed <= 6; seed++) {
      const run = fuzz(target, { limit: { inputs: 10_000 }, seed, corpus: [] });
      inputs += run.inputs;
      finding = run.finding;
    }
    t.diagnostic(`${inputs} inputs`);
    assert.ok(finding, `not found in ${inputs} inputs`);
    assert.match(finding.error.message, message);
    assert.ok(finding.input.length < bytesMax, `${finding.input.length} bytes`);
  });
