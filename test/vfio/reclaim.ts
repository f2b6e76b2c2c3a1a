/**
 * What the host can reclaim of a guest, in the proof machine: `node test/vfio/reclaim.js BDF static|coiommu`, in the
 * cgroup CGROUP, with swap. Prints JSON.
 */
import { writeFileSync } from "node:fs";
import { random } from "../../src/base/random.ts";
import { FRAME_SIZE, type Gfn, type Gpa, gpaOf } from "../../src/base/units.ts";
import { withoutMemory } from "../../src/host/discarded.ts";
import { Shadow } from "./shadow.ts";
import { DATA_FRAMES, dataFrame, World } from "./world.ts";

const CGROUP = "/sys/fs/cgroup/guest";
/** One frame of so many stays mapped, and as many were. */
const MAPPED_OF = 8;
const TRIES = 8;

const [bdf, strategy] = process.argv.slice(2) as [string, "static" | "coiommu"];
const world = new World({ bdf, strategy });
const shadow = new Shadow(world, random(1));
const frames = Array.from({ length: 2 * DATA_FRAMES }, (_, i) => dataFrame(i) as Gfn);
for (const gfn of frames) shadow.fill({ address: gpaOf(gfn), length: 64 });

const every = (offset: number) => frames.filter((_, i) => i % MAPPED_OF === offset);
const [mapped, idle] = [every(0), every(4)];
const map = (gfns: readonly Gfn[]) =>
  gfns.map((gfn) => world.dma.mapSingle(gpaOf(gfn), FRAME_SIZE, "bidirectional"));
map(mapped);
for (const iova of map(idle)) world.dma.unmapSingle(iova, FRAME_SIZE, "bidirectional");
const lockedWithIdle = world.pinner.kernelPinnedPages();
for (let i = 0; i < 3; i++) world.pass();

/** How many of these frames have memory. */
function resident(gfns: readonly Gfn[]): number {
  const lost = new Uint8Array(gfns.length);
  const addresses = Float64Array.from(gfns, (gfn) => world.memory.hostAddress(gpaOf(gfn)));
  withoutMemory(addresses, gfns.length, lost);
  return lost.reduce((left, gone) => left - gone, gfns.length);
}

const others = frames.filter((gfn) => !mapped.includes(gfn));
const before = { mapped: resident(mapped), others: resident(others) };
for (let i = 0; i < TRIES && resident(others) > 0; i++)
  try {
    writeFileSync(`${CGROUP}/memory.reclaim`, "512M");
  } catch (error) {
    // Less than that could be reclaimed.
    if ((error as NodeJS.ErrnoException).code !== "EAGAIN") throw error;
  }
const after = { mapped: resident(mapped), others: resident(others) };
const locked = world.pinner.kernelPinnedPages();

// The function reads what stayed, and what is mapped again and comes from swap; and it writes there.
map(idle);
let dmaErrors = 0;
[...mapped, ...idle].forEach((gfn, block) => {
  const address = gpaOf(gfn);
  const piece = { address, length: 512 };
  const fresh = { address: (address + 512) as Gpa, length: 512 };
  dmaErrors += Number(world.dmaTo("write", block, 1, address) !== 0);
  dmaErrors += Number(world.dmaTo("read", block, 1, fresh.address) !== 0);
  shadow.bytes(fresh).set(shadow.bytes(piece));
});
const wrongFrames = shadow.wrongFrames().length;
const counts = {
  mappedFrames: mapped.length,
  otherFrames: others.length,
  ramFrames: world.memory.size / FRAME_SIZE,
};
console.log(JSON.stringify({ ...counts, before, after, lockedWithIdle, locked, dmaErrors, wrongFrames }));
world.close();
