/**
 * PIN of 256 frames over io_uring: neighbours, which become extents, against every other frame, which takes a slot each as
 * all did before there were extents; and what their unpin costs: all at once, every fourth, and one by one in no order.
 */
import { random } from "../src/base/random.ts";
import type { Gfn, Gpa, Nanoseconds } from "../src/base/units.ts";
import { monotonicClock } from "../src/host/clock.ts";
import { IoUringPinner } from "../src/host/io-uring-pinner.ts";
import { createMemfd, FdMapper } from "../src/host/mapping.ts";
import { PresentMappings } from "../src/host/present-mappings.ts";
import { GuestMemory } from "../src/memory/guest-memory.ts";
import { GfnBuffer } from "../src/policy/policy.ts";
import { createPolicy } from "../src/policy/registry.ts";
import { Pins } from "../src/tracking/pins.ts";
import { createIommuBuffer, SoftwareIommu } from "../src/tracking/software-iommu.ts";
import { compare, type Series } from "./compare.ts";

const FRAMES = 256;
const PAGE = 4096;
/** Requests in one measurement. */
const LOOPS = 20;

const CASES = ["apart", "together"] as const;
type PerCase = Readonly<Record<(typeof CASES)[number], Series>>;
/** Frames in an unpin; those of one measurement are all frames. */
const UNPINS = { whole: FRAMES, fourths: FRAMES / 4, single: 1 } as const;
type Unpin = keyof typeof UNPINS;

export interface ExtentsReport {
  readonly bench: "extents";
  readonly rounds: number;
  readonly frames: number;
  /** Nanoseconds per frame. */
  readonly pin: PerCase;
  readonly unpin: Readonly<Record<Unpin, PerCase>>;
}

export function extents(rounds: number): ExtentsReport {
  const present = new PresentMappings((reason) => {
    throw new Error(reason);
  });
  const mapper = new FdMapper(present);
  const pinner = new IoUringPinner();
  try {
    const size = 2 * FRAMES * PAGE;
    const region = { gpa: 0 as Gpa, size, ...mapper.map(createMemfd("coiommu-bench", size), 0, size) };
    region.bytes.fill(1); // its pages are there
    const iommu = new SoftwareIommu(createIommuBuffer(2 * FRAMES), monotonicClock);
    const memory = new GuestMemory([region]);
    const pins = new Pins({ memory, pinner, iommu, policy: createPolicy("off"), clock: monotonicClock });
    const list = new GfnBuffer(FRAMES * 32);
    const orders: Record<Unpin, readonly number[]> = {
      whole: Array.from({ length: FRAMES }, (_, i) => i),
      fourths: Array.from({ length: FRAMES }, (_, i) => ((i * 4) % FRAMES) + Math.floor((i * 4) / FRAMES)),
      single: shuffled(),
    };
    const unpin = (how: Unpin, stride: number) => {
      for (let i = 0; i < FRAMES; i += UNPINS[how]) {
        list.clear();
        for (const frame of orders[how].slice(i, i + UNPINS[how])) list.push((frame * stride) as Gfn);
        pins.addOthers(list);
        pins.unpin(list, 0 as Nanoseconds);
      }
      if (pins.size > 0) throw new Error(`${pins.size} frames stay pinned`);
    };
    const measure = (what: "pin" | Unpin): PerCase => {
      const run = (stride: number) => () => {
        const gfns = Array.from({ length: FRAMES }, (_, i) => (i * stride) as Gfn);
        let time = 0;
        for (let i = 0; i < LOOPS; i++) {
          const start = monotonicClock.now();
          pins.pin(gfns, 1);
          const pinned = monotonicClock.now();
          unpin(what === "pin" ? "whole" : what, stride);
          time += what === "pin" ? pinned - start : monotonicClock.now() - pinned;
        }
        return time / (LOOPS * FRAMES);
      };
      return compare(rounds, { apart: run(2), together: run(1) });
    };
    return {
      ...{ bench: "extents", rounds, frames: FRAMES, pin: measure("pin") },
      unpin: { whole: measure("whole"), fourths: measure("fourths"), single: measure("single") },
    };
  } finally {
    pinner.close();
    present.close();
    mapper.close();
  }
}

/** All frames, in the same random order each time. */
function shuffled(): number[] {
  const next = random(1);
  return Array.from({ length: FRAMES }, (_, frame) => ({ frame, key: next(1 << 30) }))
    .sort((a, b) => a.key - b.key)
    .map(({ frame }) => frame);
}
