/**
 * How much can be pinned through one container, whose mappings are limited in number, page by page and as the backend
 * does it. The guest's RAM of many GiB shows the same memory again and again: mappings and pins are real, memory is not
 * needed for all of them.
 */
import { HostError } from "../../src/base/errors.ts";
import { random } from "../../src/base/random.ts";
import type { Gfn, Gpa } from "../../src/base/units.ts";
import { createMemfd, FdMapper } from "../../src/host/mapping.ts";
import { PresentMappings } from "../../src/host/present-mappings.ts";
import { VfioPinner } from "../../src/host/vfio-pinner.ts";
import type { GuestRegion } from "../../src/memory/guest-memory.ts";
import type { Pins } from "../../src/tracking/pins.ts";
import { pinsOf } from "./pins.ts";

const PAGE = 4096;
const MIB_FRAMES = 2 ** 20 / PAGE;
/** What each region of the guest's RAM shows. */
const SHOWN = 256 * 2 ** 20;
/** The first frame: RAM begins above what IOMMUs reserve below 4 GiB. */
const FIRST = 2 ** 20;
const TOGETHER = 512;

/** What a guest touches, frame by frame; `present`: memory that it has used before. */
const CASES = [
  { how: "in sequence, used memory", inOrder: true, present: true },
  { how: "in sequence, fresh memory", inOrder: true, present: false },
  { how: "in no order, fresh memory", inOrder: false, present: false },
] as const;
type Case = (typeof CASES)[number];

export interface EntriesCase {
  readonly how: string;
  /** Frames that the guest has asked for. */
  readonly touchedMiB: number;
  /** Pinned at the end, with what is pinned beyond need. */
  readonly pinnedMiB: number;
  readonly mappings: number;
  readonly mappingsPerMiB: number;
  readonly beyondNeedPercent: number;
  /** Why it ended: no mapping was left, or all that the guest has is pinned, or the touches were as many as are measured. */
  readonly ended: "no mapping left" | "all touched";
}

export interface EntriesReport {
  readonly limit: number | undefined;
  readonly ramMiB: number;
  readonly pageWise: { readonly pinnedMiB: number };
  readonly cases: readonly EntriesCase[];
}

/** `touchesMax`: frames in no order that are touched at most. */
export function entries(container: number, ramMiB: number, touchesMax: number): EntriesReport {
  const present = new PresentMappings(() => {});
  const mapper = new FdMapper(present);
  try {
    const shown = mapper.map(createMemfd("coiommu-bench", SHOWN), 0, SHOWN);
    shown.bytes.fill(1);
    const frames = ramMiB * MIB_FRAMES;
    const regions = Array.from(
      { length: (ramMiB * 2 ** 20) / SHOWN },
      (_, i): GuestRegion => ({
        ...shown,
        gpa: (FIRST * PAGE + i * SHOWN) as Gpa,
        size: SHOWN,
      }),
    );
    const limit = within(container, (pinner) => pinner.pinsMax);
    const pageWise = within(container, (pinner) => pageByPage(pinner, regions));
    const fresh = regions.map((region) => ({ ...region, presentAddress: undefined }));
    const cases = CASES.map((c) => {
      return within(container, (pinner) => touch(pinner, c.present ? regions : fresh, frames, c, touchesMax));
    });
    return { limit, ramMiB, pageWise: { pinnedMiB: pageWise / MIB_FRAMES }, cases };
  } finally {
    mapper.close();
    present.close();
  }
}

function within<T>(container: number, measure: (pinner: VfioPinner) => T): T {
  const pinner = new VfioPinner({ container });
  try {
    return measure(pinner);
  } finally {
    pinner.close();
  }
}

/** Frames that could be pinned. */
function pageByPage(pinner: VfioPinner, regions: readonly GuestRegion[]): number {
  const handle = new Int32Array(1);
  let pinned = 0;
  for (const { gpa, hostAddress, size } of regions)
    for (let at = 0; at < size; at += PAGE) {
      try {
        pinner.pin(
          Float64Array.of(hostAddress + at),
          1,
          handle,
          Int32Array.of(1),
          Int32Array.of((gpa + at) / PAGE),
        );
      } catch (error) {
        if (error instanceof HostError && error.errno === "ENOSPC") return pinned;
        throw error;
      }
      pinned++;
    }
  return pinned;
}

function touch(
  pinner: VfioPinner,
  regions: readonly GuestRegion[],
  frames: number,
  { how, inOrder }: Case,
  touchesMax: number,
): EntriesCase {
  const pins = pinsOf(regions, FIRST + frames, pinner);
  const ended = inOrder ? touchInOrder(pins, frames) : touchInNoOrder(pins, frames, touchesMax);
  return {
    how,
    touchedMiB: pins.ledger.size / MIB_FRAMES,
    pinnedMiB: pins.size / MIB_FRAMES,
    mappings: pinner.pinsNow,
    mappingsPerMiB: (pinner.pinsNow * MIB_FRAMES) / pins.size,
    beyondNeedPercent: (100 * pins.orphans) / pins.size,
    ended,
  };
}

/** Those that a mapping has already are asked for together, which changes no mapping, and saves minutes. */
function touchInOrder(pins: Pins, frames: number): EntriesCase["ended"] {
  for (let gfn = FIRST; gfn < FIRST + frames; ) {
    const asked = [gfn++ as Gfn];
    if (pins.covers(asked[0]!))
      while (gfn < FIRST + frames && asked.length < TOGETHER && pins.covers(gfn as Gfn))
        asked.push(gfn++ as Gfn);
    if (!pinned(pins, asked)) return "no mapping left";
  }
  return "all touched";
}

function touchInNoOrder(pins: Pins, frames: number, touches: number): EntriesCase["ended"] {
  const below = random(1);
  for (let i = 0; i < touches; i++) {
    const gfn = (FIRST + below(frames)) as Gfn;
    if (!pins.ledger.has(gfn) && !pinned(pins, [gfn])) return "no mapping left";
  }
  return "all touched";
}

function pinned(pins: Pins, gfns: readonly Gfn[]): boolean {
  try {
    pins.pin(gfns, 1);
    return true;
  } catch (error) {
    if (error instanceof HostError && error.errno === "ENOSPC") return false;
    throw error;
  }
}
