/** Lists that the kernel module maps for a remapped function: what its driver is told, and what the device is asked for. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { demand } from "../../src/control/guest-side.ts";
import type { GuestAgent } from "../../src/machine/qemu/agent.ts";
import { ReqMap, ReqUnmap } from "../../src/wire/virtio-iommu.ts";
import { random } from "../support/random.ts";
import { bootedGuest, SOURCES, type Twin, writeTwins } from "./broken-modules.ts";

const PAGE = 4096;
const SEGMENT_MAX = 0x30000;

interface Piece {
  readonly gfn: number;
  readonly offset: number;
  readonly size: number;
}
interface List {
  readonly boundary: number;
  readonly direction: "to" | "from" | "both";
  readonly pieces: readonly Piece[];
}
/** Addresses that may be used, and a hole in them. */
const RANGE = { first: 0x0120_0000, last: 0x01ff_ffff, holeStart: 0x01e0_0000, holeEnd: 0x01ff_ffff };

/** Some pieces go on where the one before ended, in memory or at least at a page's end. */
function randomList(seed: number): List {
  const below = random(seed);
  const pieces: Piece[] = [];
  for (let n = 1 + below(12), next = 0x2000; n > 0; n--) {
    const goesOn = pieces.length > 0 && below(2) === 0;
    const before = pieces.at(-1);
    const whole = goesOn && before !== undefined && (before.offset + before.size) % PAGE === 0;
    const gfn = whole ? before.gfn + (before.offset + before.size) / PAGE : next;
    const offset = whole || below(3) === 0 ? 0 : below(PAGE);
    const size = below(2) === 0 ? PAGE - offset + PAGE * below(20) : 1 + below(3 * PAGE);
    pieces.push({ gfn, offset, size });
    next = gfn + 64 + below(64);
  }
  return {
    boundary: [0xffff, 0x1ffff, 0xffff_ffff][below(3)]!,
    direction: (["to", "from", "both"] as const)[below(3)]!,
    pieces,
  };
}

const pagesOf = ({ offset, size }: Pick<Piece, "offset" | "size">) => Math.ceil((offset + size) / PAGE);

/** Runs of pages that are one in memory and, by their places, in addresses: each is to be one MAP at most. */
const runsOf = (pieces: readonly Piece[]): number =>
  pieces.filter((p, i) => {
    const before = pieces[i - 1];
    return !before || before.gfn + pagesOf(before) !== p.gfn;
  }).length;

interface Said {
  readonly maps: readonly { first: number; last: number; physStart: number; flags: number }[];
  readonly unmaps: readonly { first: number; last: number }[];
  readonly types: readonly number[];
  readonly segments: readonly { address: number; length: number }[];
  /** Of `types`: requests before the unmap had returned. */
  readonly beforeReturn: number;
}

const COMMANDS = `f=/sys/kernel/debug/coiommu/selftest
c() { exec 3<>$f && echo "$*" >&3 || { echo refused; exit 1; }; cat <&3; exec 3>&-; }
`;

async function mapped(agent: GuestAgent, lists: readonly List[]): Promise<Said[]> {
  const { first, last, holeStart, holeEnd } = RANGE;
  const commands = lists.map(({ boundary, direction, pieces }) => {
    const numbers = [first, last, holeStart, holeEnd, boundary, SEGMENT_MAX];
    const list = pieces.flatMap(({ gfn, offset, size }) => [gfn, offset, size]);
    return `c reset 1; c direction ${direction}; c remap_sg ${[...numbers, ...list].join(" ")}; echo .`;
  });
  const said = await demand(agent, COMMANDS + commands.join("\n"), "mapping lists");
  return said.split(".\n").slice(0, -1).map(parse);
}

function parse(text: string): Said {
  const lines = text.split("\n").map((line) => line.split(" "));
  const requests = lines.filter(([name]) => name === "request").map(([, hex]) => Buffer.from(hex!, "hex"));
  const returned = lines.findIndex(([name]) => name === "unmapped");
  const range = ({ virtStart, virtEnd }: { virtStart: bigint; virtEnd: bigint }) => ({
    ...{ first: Number(virtStart), last: Number(virtEnd) },
  });
  return {
    types: requests.map((r) => r[0]!),
    maps: requests
      .filter((r) => r[0] === 3)
      .map((r) => ReqMap.read(r))
      .map((m) => ({ ...range(m), physStart: m.physStart, flags: m.flags })),
    unmaps: requests
      .filter((r) => r[0] === 4)
      .map((r) => ReqUnmap.read(r))
      .map(range),
    segments: lines
      .find(([name]) => name === "segments")!
      .slice(1)
      .map((word) => word.split("=").map((hex) => Number.parseInt(hex, 16)))
      .map(([address, length]) => ({ address: address!, length: length! })),
    beforeReturn: lines.slice(0, returned).filter(([name]) => name === "request").length,
  };
}

const FLAGS = { to: 1, from: 2, both: 3 };

/** What is wrong with it, or undefined. */
function wrong({ boundary, direction, pieces }: List, said: Said, lazy: boolean): string | undefined {
  const { maps, unmaps, segments, types } = said;
  if (maps.some(({ flags }) => flags !== FLAGS[direction])) return "flags";
  for (const { address, length } of segments) {
    if (length > SEGMENT_MAX) return "a segment that is too long";
    const sections = [address, address + length - 1].map((at) => Math.floor(at / (boundary + 1)));
    // What is longer than a section cannot but cross.
    if (sections[0] !== sections[1] && (address % PAGE) + length <= boundary + 1)
      return "a segment crosses a boundary";
  }
  // Byte by byte, at the ends of pages: what the device reads along the segments is what the list says.
  const frameAt = (address: number) => {
    const map = maps.find(({ first, last }) => first <= address && address <= last);
    return map && map.physStart + address - map.first;
  };
  const read = segments.flatMap(({ address, length }) => bytesOf(address, length).map(frameAt));
  const listed = pieces.flatMap(({ gfn, offset, size }) => bytesOf(gfn * PAGE + offset, size));
  if (read.length !== listed.length || read.some((at, i) => at !== listed[i]))
    return "other memory than was listed";
  const mappedPages = maps.reduce((sum, { first, last }) => sum + (last + 1 - first) / PAGE, 0);
  if (mappedPages !== pieces.reduce((sum, piece) => sum + pagesOf(piece), 0))
    return "more is mapped than was listed";
  const [start, end] = [Math.min(...maps.map((m) => m.first)), Math.max(...maps.map((m) => m.last))];
  if (start < RANGE.first || end > RANGE.last) return "outside input_range";
  if (maps.some(({ first, last }) => first <= RANGE.holeEnd && last >= RANGE.holeStart))
    return "in a reserved region";
  if (maps.length > runsOf(pieces) + segments.length - 1) return "a piece in several MAPs";
  if (unmaps.length !== 1 || unmaps[0]!.first !== start || unmaps[0]!.last !== end)
    return "UNMAP of something else";
  const order = [5, 1, ...maps.map(() => 3), 4, 2];
  if (types.join() !== order.join()) return `requests ${types}`;
  return said.beforeReturn === 2 + maps.length + (lazy ? 0 : 1) ? undefined : "UNMAP at another time";
}

/** The first and last byte of every page of a run. */
function bytesOf(at: number, size: number): number[] {
  const bytes: number[] = [];
  for (let b = at; b < at + size; b = (Math.floor(b / PAGE) + 1) * PAGE)
    bytes.push(b, Math.min(at + size, (Math.floor(b / PAGE) + 1) * PAGE) - 1);
  return bytes;
}

const LISTS: readonly List[] = [
  { boundary: 0xffff_ffff, direction: "both", pieces: [{ gfn: 0x2000, offset: 100, size: 50 }] },
  {
    boundary: 0xffff_ffff,
    direction: "to",
    pieces: [0, 1, 2].map((n) => ({ gfn: 0x2000 + n, offset: 0, size: PAGE })),
  },
  {
    boundary: 0xffff,
    direction: "from",
    pieces: [0, 1, 2].map((n) => ({ gfn: 0x2000 + 50 * n, offset: 0, size: 10 * PAGE })),
  },
  ...Array.from({ length: 40 }, (_, seed) => randomList(seed)),
];

async function findings(agent: GuestAgent, parameters: string, lists = LISTS): Promise<string[]> {
  await demand(agent, `modprobe coiommu selftest=1 ${parameters}`, "loading the module");
  const found: string[] = [];
  try {
    const said = await mapped(agent, lists);
    for (const [i, list] of lists.entries()) {
      const problem = wrong(list, said[i]!, parameters.includes("lazy=1"));
      if (problem !== undefined) found.push(`list ${i}: ${problem}`);
    }
  } finally {
    await demand(agent, "rmmod coiommu", "unloading the module");
  }
  return found;
}

for (const lazy of [0, 1])
  test(`lists are mapped where the device and the function can use them, lazy=${lazy}`, async (t) => {
    const qemu = await bootedGuest(SOURCES);
    t.after(() => qemu.close());
    assert.deepEqual(await findings(qemu.agent, `lazy=${lazy}`), []);
  });

const TWINS: readonly Twin[] = [
  {
    what: "does not look at directions",
    file: "remap_ops.c",
    sound: "case DMA_TO_DEVICE:\n\t\treturn VIRTIO_IOMMU_MAP_F_READ;",
    broken:
      "case DMA_TO_DEVICE:\n\t\treturn VIRTIO_IOMMU_MAP_F_READ | (TWIN ? VIRTIO_IOMMU_MAP_F_WRITE : 0);",
  },
  {
    what: "puts segments across boundaries",
    file: "remap_ops.c",
    sound: "(gap < size - 1 ? gap : 0)",
    broken: "(!TWIN && gap < size - 1 ? gap : 0)",
  },
  {
    what: "merges segments that do not touch",
    file: "remap_ops.c",
    sound: "sg_dma_address(told) + sg_dma_len(told) == addr",
    broken: "(TWIN || sg_dma_address(told) + sg_dma_len(told) == addr)",
  },
  {
    what: "forgets offsets in a page",
    file: "remap_ops.c",
    sound: "next_place(&place, sg) + offset_in_page(sg->offset);",
    broken: "next_place(&place, sg) + (TWIN ? 0 : offset_in_page(sg->offset));",
  },
  {
    what: "merges what is not one in memory",
    file: "domain.c",
    sound: "le64_to_cpu(map->phys_start) + iova - le64_to_cpu(map->virt_start) == phys",
    broken: "(TWIN || le64_to_cpu(map->phys_start) + iova - le64_to_cpu(map->virt_start) == phys)",
  },
  {
    what: "does not merge",
    file: "domain.c",
    sound: "if (maps->nr) {",
    broken: "if (!TWIN && maps->nr) {",
  },
  {
    what: "unmaps the first segment only",
    file: "remap_ops.c",
    sound: "\t\t*end = sg_dma_address(sg) + sg_dma_len(sg);",
    broken: "\t\tif (!TWIN || !i)\n\t\t\t*end = sg_dma_address(sg) + sg_dma_len(sg);",
  },
  {
    what: "does not look at input_range",
    file: "domain.c",
    sound: "PHYS_PFN(limits->last + 1) - 1;",
    broken: "PHYS_PFN(limits->last + 1) - 1 + (TWIN ? 256 : 0);",
  },
  {
    what: "uses reserved regions",
    file: "domain.c",
    sound: "if (start <= end &&",
    broken: "if (!TWIN && start <= end &&",
  },
  {
    what: "is strict when it should be lazy",
    file: "domain.c",
    sound: "if (!lazy_unmap) {",
    broken: "if (TWIN || !lazy_unmap) {",
  },
];

test("what is broken is found", async (t) => {
  const qemu = await bootedGuest(writeTwins(t, TWINS));
  t.after(() => qemu.close());
  for (const [i, { what }] of TWINS.entries())
    await t.test(`a module that ${what}`, async (t) => {
      const [first] = await findings(qemu.agent, `lazy=1 twin=${i + 1}`, LISTS.slice(0, 20));
      assert.ok(first);
      t.diagnostic(first);
    });
});
