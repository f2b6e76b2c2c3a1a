/** Runs the cases of test/vectors/driver-cases.ts against a guest driver, whatever it is written in. */
import { TU_ACCESSED, TU_COUNT, TU_DIRTY, TU_PINNED, TU_WRITABLE } from "../../src/wire/dtt.ts";
import { PinRange, ReqPin, VIRTIO_IOMMU_T_PIN } from "../../src/wire/virtio-iommu.ts";
import {
  type Answer,
  type Buffers,
  type Case,
  formatRanges,
  type PinRequest,
  type Range,
  type Step,
  touched,
} from "../vectors/driver-case.ts";
import { MACHINE } from "../vectors/driver-cases.ts";

/** Whose mappings they are. */
export const ENDPOINT = 0x20;
const BATCH_MAX = 16;

/** Unit by frame. */
export type UnitWords = ReadonlyMap<number, number>;

/** How the host answers a request: it sets P of frames, then writes so much of the tail; or no answer comes. */
export interface HostAnswer {
  readonly pins: readonly number[];
  readonly reply: { readonly written: number; readonly status: number } | "silence";
}
/** A request as the host sees it: its bytes without the tail, and the units at that moment. */
export interface SeenRequest {
  readonly bytes: Uint8Array;
  readonly units: UnitWords;
}
export interface MapOutcome {
  /** A Result of the case table, if the driver keeps to it. */
  readonly result: string;
  readonly requests: readonly SeenRequest[];
}

export interface UnmapOutcome {
  /** Frames that were counted down. */
  readonly counted: number;
  /** Frames that had no mapping, as the driver reports them. */
  readonly reported: number;
}

type Awaitable<T> = T | Promise<T>;

/** A driver for the guest MACHINE, whose host is a script. Calls are carried out in their order, awaited or not. */
export interface DriverUnderTest {
  /**
   * An empty table, and a device that is on, accepts `batchMax` ranges and may have PIN_DIRTY; `frames`: whose units are
   * looked at.
   */
  reset(batchMax: number, frames: readonly number[], pinDirty: boolean): Awaitable<void>;
  setUnit(gfn: number, word: number): Awaitable<void>;
  /** Of the frames given to reset(); those that have none, or 0, may be left out. */
  units(): Awaitable<UnitWords>;
  /** A request for which `host` has no answer is one too many: it is reported, and what comes of it is open. */
  map(buffers: Buffers, host: readonly HostAnswer[]): Awaitable<MapOutcome>;
  unmap(buffers: Buffers): Awaitable<UnmapOutcome>;
  /** The request that got silence comes back, after P of `pins` was set. */
  late(pins: readonly number[]): Awaitable<void>;
  device(on: boolean): Awaitable<void>;
}

/** Run a case; returns the first difference between what it says and what happened. */
export async function firstDifference(driver: DriverUnderTest, tested: Case): Promise<string | undefined> {
  // No step waits for the one before, so that a driver far away can take them all at once.
  const [, ...differences] = await Promise.all([
    driver.reset(tested.batchMax ?? BATCH_MAX, watched(tested), tested.pinDirty ?? false),
    ...tested.steps.map((step) => runStep(driver, step)),
  ]);
  const at = differences.findIndex((difference) => difference !== undefined);
  return at < 0
    ? undefined
    : `${tested.name} (section ${tested.section}): step ${at + 1}: ${differences[at]}`;
}

async function runStep(driver: DriverUnderTest, step: Step): Promise<string | undefined> {
  if ("set" in step) {
    await Promise.all([...parseUnits(step.set)].map(([gfn, word]) => driver.setUnit(gfn, word)));
    return undefined;
  }
  if ("late" in step) return void (await driver.late(step.late));
  if ("device" in step) return void (await driver.device(step.device === "on"));
  if ("unmap" in step) {
    const [{ counted, reported }, units] = await Promise.all([driver.unmap(step.unmap), driver.units()]);
    return (
      differs("frames counted down", counted, step.counted) ??
      differs("frames reported", reported, touched(step.unmap).length - step.counted) ??
      differs("units", formatUnits(units), step.units)
    );
  }
  const mapped = driver.map(step.map, step.asks.map(hostAnswer));
  const [{ requests, result }, units] = await Promise.all([mapped, driver.units()]);
  for (const [i, asked] of step.asks.entries()) {
    const difference = requestDiffers(requests[i], asked);
    if (difference) return `request ${i + 1}: ${difference}`;
  }
  return (
    differs("number of requests", requests.length, step.asks.length) ??
    differs("result", result, step.result) ??
    differs("units", formatUnits(units), step.units)
  );
}

function requestDiffers(seen: SeenRequest | undefined, asked: PinRequest): string | undefined {
  if (!seen) return "it is not made";
  const { endpoint, ranges, malformed } = parseRequest(seen.bytes);
  return (
    malformed ??
    differs("ranges", formatRanges(ranges), asked.ranges) ??
    differs("endpoint", endpoint, ENDPOINT) ??
    differs("units", formatUnits(seen.units), asked.units)
  );
}

const differs = (what: string, actual: number | string, expected: number | string): string | undefined =>
  actual === expected ? undefined : `${what}: "${actual}", not "${expected}"`;

/** By docs/abi.md section 3; `malformed` says what a device would answer INVAL or UNSUPP for. */
export function parseRequest(bytes: Uint8Array): { endpoint: number; ranges: Range[]; malformed?: string } {
  if (bytes.length < ReqPin.size) return { endpoint: 0, ranges: [], malformed: `${bytes.length} bytes` };
  const { endpoint, nrRanges } = ReqPin.read(bytes);
  const parts = Array.from({ length: Math.floor((bytes.length - ReqPin.size) / PinRange.size) }, (_, i) =>
    PinRange.read(bytes, ReqPin.size + i * PinRange.size),
  );
  const ranges = parts.map(({ gfn, nrFrames }): Range => [gfn, nrFrames]);
  // Written anew from what was read, it is the same: type, sizes and reserved fields are right.
  const again = ReqPin.encode(
    { type: VIRTIO_IOMMU_T_PIN, endpoint, nrRanges: parts.length },
    parts.length * PinRange.size,
  );
  parts.forEach(({ gfn, nrFrames }, i) => {
    PinRange.write(again, { gfn, nrFrames }, ReqPin.size + i * PinRange.size);
  });
  if (nrRanges === parts.length && Buffer.compare(bytes, again) === 0) return { endpoint, ranges };
  return { endpoint, ranges, malformed: `malformed: ${Buffer.from(bytes).toString("hex")}` };
}

/** Every frame that the case names or touches, and their neighbours, which must not change. */
function watched({ steps }: Case): number[] {
  const frames = steps.flatMap((step) => {
    if ("map" in step) return touched(step.map);
    if ("unmap" in step) return touched(step.unmap);
    return "set" in step ? [...parseUnits(step.set).keys()] : [];
  });
  return [...new Set(frames.flatMap((gfn) => [gfn - 1, gfn, gfn + 1]))].sort((a, b) => a - b);
}

const STATUS: Readonly<Record<Exclude<Answer, number | "unwritten" | "silence">, number>> = {
  ...{ OK: 0, IOERR: 1, UNSUPP: 2, DEVERR: 3, INVAL: 4, RANGE: 5, NOENT: 6, FAULT: 7, NOMEM: 8 },
};
/** As a Result has it. */
export const statusName = (status: number): string =>
  Object.entries(STATUS).find(([, value]) => value === status)?.[0] ?? "unknown";

export function hostAnswer({ answer, pins }: Pick<PinRequest, "answer" | "pins">): HostAnswer {
  if (answer === "silence") return { pins, reply: "silence" };
  if (answer === "unwritten") return { pins, reply: { written: 0, status: 0 } };
  return { pins, reply: { written: 4, status: typeof answer === "number" ? answer : STATUS[answer] } };
}

const COUNT_MAX = TU_COUNT - MACHINE.cpus;
const COUNTS: Readonly<Record<string, number>> = { max: COUNT_MAX, "max-1": COUNT_MAX - 1 };
const FLAGS: Readonly<Record<string, number>> = {
  ...{ P: TU_PINNED, A: TU_ACCESSED, D: TU_DIRTY, W: TU_WRITABLE },
};

/** `100: P A 3, 101:` names frame 101 to make it 0. */
export function parseUnits(text: string): Map<number, number> {
  return new Map(
    text.split(", ").map((part) => {
      const [gfn, unit] = part.split(":");
      const words = unit!.trim().split(" ").filter(Boolean);
      return [Number(gfn), words.reduce((sum, w) => sum + (FLAGS[w] ?? COUNTS[w] ?? Number(w)), 0)];
    }),
  );
}

export function formatUnits(units: UnitWords): string {
  return [...units]
    .filter(([, word]) => word !== 0)
    .sort(([a], [b]) => a - b)
    .map(([gfn, word]) => `${gfn}: ${formatUnit(word)}`)
    .join(", ");
}

function formatUnit(word: number): string {
  const flags = Object.entries(FLAGS).filter(([, bit]) => (word & bit) !== 0);
  const rest = (word >>> 0) - flags.reduce((sum, [, bit]) => sum + bit, 0);
  const count = Object.entries(COUNTS).find(([, value]) => value === rest)?.[0];
  return [...flags.map(([name]) => name), ...(rest ? [count ?? `${rest}`] : [])].join(" ");
}
