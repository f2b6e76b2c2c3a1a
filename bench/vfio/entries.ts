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
import { pinsOf } from "./pins.ts";

const PAGE = 4096;
const MIB_FRAMES = 2 ** 20 / PAGE;
/** What each region of the guest's RAM shows. */
const SHOWN = 256 * 2 ** 20;
/** RAM begins above what IOMMUs reserve below 4 GiB. */
const FIRST = 2 ** 32;

/** What a guest touches, `frames` at a time; `present`: memory that it has used before. */
const CASES = [
  { how: "in sequence, used memory", frames: 4, present: true, next: (frames: number) => inSequence(frames) },
  {
    how: "in sequence, fresh memory",
    frames: 4,
    present: false,
    next: (frames: number) => inSequence(frames),
  },
  {
    how: "in no order, fresh memory",
    frames: 1,
    present: false,
    next: (frames: number) => inNoOrder(frames),
  },
] as const;
type Case = (typeof CASES)[number];

const inSequence = (frames: number) => (touch: number) => (4 * touch < frames ? 4 * touch : undefined);
function inNoOrder(frames: number): (touch: number) => number {
  const below = random(1);
  return () => below(frames);
}

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
export function entries(
  container: number,
  ramMiB: number,
  touchesMax: number,
  say: (text: string) => void,
): EntriesReport {
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
        gpa: (FIRST + i * SHOWN) as Gpa,
        size: SHOWN,
      }),
    );
    const limit = within(container, (pinner) => pinner.pinsMax);
    say("pinning page by page");
    const pageWise = within(container, (pinner) => pageByPage(pinner, regions));
    const fresh = regions.map((region) => ({ ...region, presentAddress: undefined }));
    const cases = CASES.map((c) => {
      say(`touching memory ${c.how}`);
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
          Float64Array.of(PAGE),
          Float64Array.of(gpa + at),
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
  { how, frames: perTouch, next }: Case,
  touchesMax: number,
): EntriesCase {
  const pins = pinsOf(regions, FIRST / PAGE + frames, pinner);
  const frameOf = next(frames);
  let ended: EntriesCase["ended"] = "all touched";
  for (let i = 0; perTouch > 1 || i < touchesMax; i++) {
    const frame = frameOf(i);
    if (frame === undefined) break;
    const first = FIRST / PAGE + frame;
    const gfns = Array.from({ length: perTouch }, (_, n) => (first + n) as Gfn).filter(
      (gfn) => !pins.ledger.has(gfn),
    );
    try {
      pins.pin(gfns, 1);
    } catch (error) {
      if (!(error instanceof HostError && error.errno === "ENOSPC")) throw error;
      ended = "no mapping left";
      break;
    }
  }
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
