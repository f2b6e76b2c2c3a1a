/**
 * What Linux answers where pins of VFIO end, in the proof machine: `node test/vfio/limits.js BDF CASE`. Prints JSON.
 */
import { HostError } from "../../src/base/errors.ts";
import { FRAME_SIZE, type Gpa } from "../../src/base/units.ts";
import { DmaMapFailed } from "../../src/driver/dma-api.ts";
import { ioctl } from "../../src/host/ioctl.ts";
import { SharedMapping } from "../../src/host/mapping.ts";
import { VfioDevice } from "../../src/host/vfio-device.ts";
import { VfioPinner } from "../../src/host/vfio-pinner.ts";
import { DmaMap, DmaUnmap, VFIO_IOMMU_MAP_DMA, VFIO_IOMMU_UNMAP_DMA } from "../../src/wire/vfio-type1.ts";
import { DATA_FRAMES, dataFrame, World } from "./world.ts";

const PAGES = 256;
const NOBODY = 65534;
const HOLE = 0xfee0_0000;
const [bdf, wanted] = process.argv.slice(2) as [string, string];

/** The errno that the host answers, and what is told of it; null when it does what it is asked. */
function refusal(action: () => unknown): string | null {
  try {
    action();
    return null;
  } catch (error) {
    if (!(error instanceof HostError)) throw error;
    return error.message;
  }
}

/** A pinner over a container, some memory, and the same container without it. */
function container() {
  const device = VfioDevice.open(bdf);
  const pinner = new VfioPinner(device);
  const ram = new SharedMapping(PAGES * FRAME_SIZE);
  const pin = (first: number, count: number, at = first): number => {
    const handles = new Int32Array(count);
    const numbers = Int32Array.from({ length: count }, (_, i) => i);
    const addresses = Float64Array.from(numbers, (i) => ram.address + (first + i) * FRAME_SIZE);
    pinner.pin(
      addresses,
      count,
      handles,
      undefined,
      numbers.map((i) => at + i),
    );
    return handles[0]!;
  };
  const map = (iova: number, size = FRAME_SIZE) => {
    const request = DmaMap.encode({ argsz: DmaMap.size, flags: 3, vaddr: ram.address, iova, size });
    ioctl(device.container, "MAP_DMA", VFIO_IOMMU_MAP_DMA, request);
  };
  /** How many bytes were unmapped. */
  const unmap = (iova: number, size = FRAME_SIZE): number => {
    const request = DmaUnmap.encode({ argsz: DmaUnmap.size, iova, size });
    ioctl(device.container, "UNMAP_DMA", VFIO_IOMMU_UNMAP_DMA, request);
    return DmaUnmap.read(request).size;
  };
  return { device, pinner, ram, pin, map, unmap, locked: () => pinner.kernelPinnedPages() };
}

const cases: Record<string, () => unknown> = {
  /** Mappings that exist, that cannot be, and that cannot be split. */
  mappings() {
    const { pinner, ram, pin, map, unmap, locked } = container();
    const block = pinner.pinExtent(ram.address, 4 * FRAME_SIZE, 0);
    const lockedFour = locked();
    map(100 * FRAME_SIZE);
    const answers = {
      lockedFour,
      middle: refusal(() => unmap(FRAME_SIZE)),
      twice: refusal(() => map(0)),
      foreign: refusal(() => pin(100, 1)),
      hole: refusal(() => pin(0, 1, HOLE / FRAME_SIZE)),
      holeOfKernel: refusal(() => map(HOLE)),
      beyond: refusal(() => pin(0, 1, 2 ** 27)),
      beyondOfKernel: refusal(() => map(2 ** 39)),
      nothing: unmap(200 * FRAME_SIZE),
      lockedFive: locked(),
      released: pinner.release(Int32Array.of(block), 1),
    };
    unmap(100 * FRAME_SIZE);
    for (const gfn of [10, 12, 14, 16]) pin(gfn, 1);
    pinner.release(Int32Array.of(10, 12, 14), 3, Uint8Array.of(0, 1, 1));
    const lockedOne = locked();
    pinner.release(Int32Array.of(16), 1);
    const lockedAtLast = locked();
    pinner.close();
    return { ...answers, lockedOne, lockedAtLast };
  },

  /** With dma_entry_limit at 64. */
  entries() {
    const { pinner, pin, locked } = container();
    const { pinsMax } = pinner;
    pin(0, 60);
    const left = pinner.pinsLeft;
    const tooMany = refusal(() => pin(100, 5));
    const lockedThen = locked();
    pin(100, 4);
    const oneMore = refusal(() => pin(200, 1));
    pinner.release(Int32Array.of(7), 1);
    const afterRelease = refusal(() => pin(200, 1));
    pinner.close();
    return { pinsMax, left, tooMany, lockedThen, oneMore, afterRelease, lockedAtLast: locked() };
  },

  /** The same limit, and a guest that maps all its memory page by page, in whatever order. */
  guest() {
    const world = new World({ bdf });
    const mapped: number[] = [];
    // 5 has no divisor in common with the number of frames.
    for (let i = 0; i < 2 * DATA_FRAMES; i++)
      try {
        const gfn = dataFrame((i * 5) % (2 * DATA_FRAMES));
        world.dma.mapSingle((gfn * FRAME_SIZE) as Gpa, FRAME_SIZE, "bidirectional");
        mapped.push(gfn);
      } catch (error) {
        if (!(error instanceof DmaMapFailed)) throw error;
      }
    const { pinsNow, pinsMax } = world.pinner;
    const pinned = world.mapped.size;
    const unreachable = mapped.filter((gfn) => !world.mapped.has(gfn)).length;
    world.close();
    const refused = 2 * DATA_FRAMES - mapped.length;
    return { frames: 2 * DATA_FRAMES, refused, unreachable, pinned, pinsNow, pinsMax };
  },

  /** With a memlock limit of 64 KiB; at first as root, who need not keep to it. */
  memlock() {
    const { pinner, pin, locked } = container();
    const root = refusal(() => pin(0, 20));
    pinner.release(
      Int32Array.from({ length: 20 }, (_, i) => i),
      20,
    );
    process.setgid!(NOBODY);
    process.setuid!(NOBODY);
    pin(0, 16);
    const oneMore = refusal(() => pin(100, 1));
    pinner.release(Int32Array.of(3), 1);
    const batch = refusal(() => pin(100, 4));
    const lockedThen = locked();
    const fits = refusal(() => pin(100, 1));
    return { root, oneMore, batch, lockedThen, fits };
  },
};

console.log(JSON.stringify(cases[wanted]!()));
