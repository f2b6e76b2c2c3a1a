/** Where pins of VFIO end: what a real kernel answers, and what we make of it. */
import assert from "node:assert/strict";
import test, { after, before } from "node:test";
import { CHECKOUT } from "./guest.ts";
import { ENTRY_LIMIT, NVME, VfioMachine } from "./machine.ts";

const ENTRIES = 64;

let machine: VfioMachine;

before(async () => {
  machine = await VfioMachine.boot({}, console.log);
  await machine.bind(NVME);
  await machine.run(`echo ${ENTRIES} >${ENTRY_LIMIT}`);
});
after(() => machine?.close());

const answers = async (of: string, limit = "unlimited") =>
  JSON.parse(await machine.run(`cd ${CHECKOUT}; ulimit -l ${limit}; node test/vfio/limits.js ${NVME} ${of}`));

test("a page is mapped once, a mapping goes as a whole, and there are addresses that no page can have", async () => {
  assert.deepEqual(await answers("mappings"), {
    lockedFour: 4,
    middle: "UNMAP_DMA: EINVAL",
    twice: "MAP_DMA: EEXIST",
    foreign: "VFIO_IOMMU_MAP_DMA: EEXIST (somebody else has mapped some of IOVAs 0x64000 to 0x64fff)",
    hole: "VFIO_IOMMU_MAP_DMA: EINVAL (the IOMMU reserves IOVAs 0xfee00000 to 0xfeefffff: no memory of the guest can be there)",
    holeOfKernel: "MAP_DMA: EINVAL",
    beyond:
      "VFIO_IOMMU_MAP_DMA: EINVAL (the IOMMU has IOVAs up to 0x7fffffffff only: no memory of the guest can be beyond)",
    beyondOfKernel: "MAP_DMA: EINVAL",
    nothing: 0,
    lockedFive: 5,
    released: 1,
    lockedOne: 1,
    lockedAtLast: 0,
  });
});

test("the kernel takes so many mappings, and what is refused is refused as a whole", async () => {
  const full = (more: number, left: number) =>
    `VFIO_IOMMU_MAP_DMA: ENOSPC (${more} more mappings, and ${left} of ${ENTRIES} are free: the module parameter dma_entry_limit of vfio_iommu_type1)`;
  assert.deepEqual(await answers("entries"), {
    pinsMax: ENTRIES,
    left: 4,
    tooMany: full(5, 4),
    lockedThen: 60,
    oneMore: full(1, 0),
    afterRelease: null,
    lockedAtLast: 0,
  });
});

test("a guest has far more pages pinned than its host has mappings, and loses nothing at the limit", async (t) => {
  const { frames, refused, pinned, pinsNow, pinsMax, unreachable } = await answers("guest");
  t.diagnostic(
    `${frames} frames mapped one by one: ${pinned} pages pinned by ${pinsNow} mappings, ${refused} refused`,
  );
  assert.deepEqual([pinsMax, unreachable], [ENTRIES, 0]);
  assert.ok(pinsNow <= ENTRIES && pinned > 100 * ENTRIES && refused < frames / 50);
});

test("a user may lock as much as the memlock limit says, and root any amount", async () => {
  const refused =
    "VFIO_IOMMU_MAP_DMA: ENOMEM (4096 bytes beyond the memlock limit of 64 KiB, or the host has no memory)";
  const expected = { root: null, oneMore: refused, batch: refused, lockedThen: 15, fits: null };
  assert.deepEqual(await answers("memlock", "64"), expected);
});
