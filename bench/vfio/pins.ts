/**
 * Pins through a VFIO container: the backend's (Pins over VfioPinner, with ledger, software IOMMU and policy), the pinner
 * alone, and the bare ioctls in C, on the same container and the same pages, alternating.
 */
import koffi from "koffi";
import type { Gfn, Gpa, Nanoseconds } from "../../src/base/units.ts";
import { monotonicClock } from "../../src/host/clock.ts";
import { createMemfd, FdMapper } from "../../src/host/mapping.ts";
import { VfioPinner } from "../../src/host/vfio-pinner.ts";
import { GuestMemory, type GuestRegion } from "../../src/memory/guest-memory.ts";
import { GfnBuffer } from "../../src/policy/policy.ts";
import { createPolicy } from "../../src/policy/registry.ts";
import { Pins } from "../../src/tracking/pins.ts";
import { createIommuBuffer, SoftwareIommu } from "../../src/tracking/software-iommu.ts";
import { compare, type Series } from "../compare.ts";

const PAGE = 4096;
const FRAMES = 1024;
/** Frames of an unpin slice. */
const SLICE = 256;
/** Rounds after which nothing is compiled any more: an emulated CPU is slow at that, too. */
const WARM_UP = 20;

/** `frames` with each request, `stride` apart: neighbours are one mapping. */
const CASES = [
  { what: "1 frame", frames: 1, stride: 2 },
  { what: "64 frames, apart", frames: 64, stride: 2 },
  { what: "64 frames, neighbours", frames: 64, stride: 1 },
] as const;

export interface PinCase {
  readonly what: string;
  /** Nanoseconds per frame. */
  readonly pin: Readonly<Record<"c" | "pinner" | "backend", Series>>;
  readonly unpin: Readonly<Record<"c" | "pinner" | "backend", Series>>;
}

/** The reference: bench/native/vfio.c, compiled as a library. */
export function native(library: string) {
  const lib = koffi.load(library);
  return {
    map: lib.func("double vfio_map(int, uint64_t, uint64_t, uint64_t, uint64_t, uint)"),
    unmap: lib.func("double vfio_unmap(int, uint64_t, uint64_t, uint64_t, uint)"),
  } as {
    map(
      container: number,
      address: number,
      iova: number,
      bytes: number,
      stride: number,
      count: number,
    ): number;
    unmap(container: number, iova: number, bytes: number, stride: number, count: number): number;
  };
}

export function pinsOf(regions: readonly GuestRegion[], frames: number, pinner: VfioPinner): Pins {
  const iommu = new SoftwareIommu(createIommuBuffer(frames), monotonicClock);
  const memory = new GuestMemory(regions);
  return new Pins({ memory, pinner, iommu, policy: createPolicy("off"), clock: monotonicClock });
}

export function pinsAgainstC(container: number, library: string, rounds: number): PinCase[] {
  const c = native(library);
  const mapper = new FdMapper();
  const pinner = new VfioPinner({ container });
  try {
    const size = 2 * FRAMES * PAGE;
    const region = { gpa: 0 as Gpa, size, ...mapper.map(createMemfd("coiommu-bench", size), 0, size) };
    region.bytes.fill(1); // its pages are there
    const pins = pinsOf([region], 2 * FRAMES, pinner);
    const cases = CASES.map(({ what, frames, stride }) => {
      const { hostAddress } = region;
      const mapped = stride === 1 ? frames : 1;
      const [bytes, apart, count] = [mapped * PAGE, mapped * stride * PAGE, FRAMES / mapped];
      const requests = Array.from({ length: FRAMES / frames }, (_, r) =>
        Array.from({ length: frames }, (_, i) => ((r * frames + i) * stride) as Gfn),
      );
      const all = requests.flat();
      const ways: Record<"c" | "pinner" | "backend", { pin(): number; unpin(): number }> = {
        c: {
          pin: () => checked(c.map(container, hostAddress, 0, bytes, apart, count)),
          unpin: () => checked(c.unmap(container, 0, bytes, apart, count)),
        },
        pinner: pinnerAlone(pinner, hostAddress, { bytes, apart, count }, frames / mapped),
        backend: {
          pin: () =>
            timed(() => {
              for (const request of requests) pins.pin(request, 1);
            }),
          unpin: () => timed(() => unpin(pins, all)),
        },
      };
      return { what, ways };
    });
    for (let i = 0; i < WARM_UP; i++)
      for (const { ways } of cases) for (const way of Object.values(ways)) figure(way, "pin");
    return cases.map(({ what, ways }) => {
      const measure = (what: "pin" | "unpin") =>
        compare(rounds, {
          c: () => figure(ways.c, what),
          pinner: () => figure(ways.pinner, what),
          backend: () => figure(ways.backend, what),
        });
      return { what, pin: measure("pin"), unpin: measure("unpin") };
    });
  } finally {
    pinner.close();
    mapper.close();
  }
}

function figure(way: { pin(): number; unpin(): number }, what: "pin" | "unpin"): number {
  const pin = way.pin();
  const unpin = way.unpin();
  return (what === "pin" ? pin : unpin) / FRAMES;
}

function pinnerAlone(
  pinner: VfioPinner,
  hostAddress: number,
  { bytes, apart, count }: { bytes: number; apart: number; count: number },
  batch: number,
) {
  const handles = new Int32Array(count);
  const adjoins = new Uint8Array(count).fill(1);
  // As a backend: the same arrays for each request.
  const addresses = new Float64Array(batch);
  const gfns = new Int32Array(batch);
  const pages = new Int32Array(batch).fill(bytes / PAGE);
  const pinned = new Int32Array(batch);
  return {
    pin: () =>
      timed(() => {
        for (let i = 0; i < count; i += batch) {
          for (let j = 0; j < batch; j++) {
            gfns[j] = ((i + j) * apart) / PAGE;
            addresses[j] = hostAddress + (i + j) * apart;
          }
          pinner.pin(addresses, batch, pinned, pages, gfns);
          for (let j = 0; j < batch; j++) handles[i + j] = pinned[j]!;
        }
      }),
    unpin: () =>
      timed(() => {
        for (let i = 0; i < count; i += SLICE) {
          const slice = handles.subarray(i, i + SLICE);
          if (pinner.release(slice, slice.length, adjoins) < slice.length)
            throw new Error("a pin was not released");
        }
      }),
  };
}

const list = new GfnBuffer(SLICE);
function unpin(pins: Pins, gfns: readonly Gfn[]): void {
  for (let i = 0; i < gfns.length; i += SLICE) {
    list.clear();
    for (const gfn of gfns.slice(i, i + SLICE)) list.push(gfn);
    pins.unpin(list, 0 as Nanoseconds);
  }
  if (pins.size > 0) throw new Error(`${pins.size} frames stay pinned`);
}

function timed(work: () => void): number {
  const start = monotonicClock.now();
  work();
  return monotonicClock.now() - start;
}

function checked(time: number): number {
  if (time < 0) throw new Error("the C loop was refused");
  return time;
}
