/** The kernel module does what the case table says, and modules that are broken on purpose do not. */
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { demand } from "../../src/control/guest-side.ts";
import type { GuestAgent } from "../../src/machine/qemu/agent.ts";
import type { Qemu } from "../../src/machine/qemu/qemu.ts";
import { ReqPin } from "../../src/wire/virtio-iommu.ts";
import { DriverInTypeScript } from "../support/driver-in-typescript.ts";
import { randomCase } from "../support/random-driver-case.ts";
import { firstDifference } from "../support/run-driver-case.ts";
import { CASES } from "../vectors/driver-cases.ts";
import { bootedGuest, SOURCES, type Twin, writeTwins } from "./broken-modules.ts";
import { KernelModule } from "./kernel-module.ts";

const RANDOM_CASES = 40;

let qemu: Qemu;
before(async () => {
  qemu = await bootedGuest(SOURCES);
});
after(() => qemu?.close());

/** Load the module, run cases, and unload it: for each case the first difference, or undefined. */
async function differences(
  agent: GuestAgent,
  parameters = "",
  cases = CASES,
): Promise<(string | undefined)[]> {
  await demand(agent, `modprobe coiommu selftest=1 ${parameters}`, "loading the module");
  const driver = new KernelModule(agent);
  try {
    return await Promise.all(cases.map((tested) => firstDifference(driver, tested)));
  } finally {
    await demand(agent, "rmmod coiommu", "unloading the module");
  }
}

test("the kernel module passes every case", async (t) => {
  const found = await differences(qemu.agent);
  for (const [i, { name }] of CASES.entries()) await t.test(name, () => assert.equal(found[i], undefined));
});

/** What the driver in TypeScript does in random cases. */
const recorded = () =>
  Promise.all(Array.from({ length: RANDOM_CASES }, (_, seed) => randomCase(new DriverInTypeScript(), seed)));

test("in random cases the kernel module does what the driver in TypeScript does", async () => {
  const found = await differences(qemu.agent, "", await recorded());
  assert.equal(
    found.find((difference) => difference !== undefined),
    undefined,
  );
});

test("the self-test takes no command that is not well-formed", async () => {
  await demand(qemu.agent, "modprobe coiommu selftest=1", "loading the module");
  const refused = `
reset
reset 0
reset x
reset 4294967296
device
device perhaps
pin_dirty
pin_dirty perhaps
direction
direction sideways
direction to from
units 1
nonsense 1
watch -1
set 100
set 100 1 1
set 100 4294967296
set 131072 1
silence 131072
late 131072
answer 4
answer 4 256
answer 256 0
answer 4 0 131072
map_single
map_single 100 0
map_single 100 0 1 101 0 1
map_sg 100 4096 1
map_sg 100 0 1048577
unmap_single 1099511627776 0 1
unmap_sg${" 100 0 1".repeat(22)}
watch${" 1".repeat(64)}
units${" ".repeat(4096)}`.split("\n");
  const script = `${refused.map((c) => `(echo '${c}' >$f) 2>/dev/null && echo 'taken: ${c}'`).join("\n")}
for i in 1 2 3 4 5 6 7 8 9; do (echo silence >$f) 2>/dev/null || echo $i; done
(echo units; echo units) >$f 2>/dev/null || echo twice
exec 3<>$f; echo units >&3; cat <&3; exec 3>&-
ls /sys/bus/virtio/drivers; rmmod coiommu`;
  const said = await demand(qemu.agent, `f=/sys/kernel/debug/coiommu/selftest\n${script}`, "commands");
  assert.equal(said, "9\ntwice\nunits\n", "and no virtio driver is registered");
});

test("a module that was loaded for work has no self-test, and none can be turned on", async () => {
  const script = `modprobe coiommu && ls /sys/kernel/debug/coiommu
cd /sys/module/coiommu/parameters && echo 1 2>/dev/null >selftest; cat selftest; rmmod coiommu`;
  assert.equal(await demand(qemu.agent, script, "looking at the module"), "counters\nremap\ntable\nN\n");
});

const TWINS: readonly Twin[] = [
  {
    what: "asks before it counts",
    file: "dma_ops.c",
    sound: "ret = coiommu_dtt_get(gfn, nr, device_writes(dir), &ask);",
    broken:
      "ret = TWIN && !coiommu_dtt_pinned(gfn) ? pin(hook, gfn, nr) : 0; if (!ret) ret = coiommu_dtt_get(gfn, nr, device_writes(dir), &ask);",
  },
  {
    what: "counts a frame too many",
    file: "dma_ops.c",
    sound: "return PFN_UP((u64)offset_in_page(addr) + size);",
    broken: "return PFN_UP((u64)offset_in_page(addr) + size + TWIN);",
  },
  {
    what: "does not roll a list back",
    file: "dma_ops.c",
    sound: "put_sg(hook, sgl, i, false);",
    broken: "if (!TWIN) put_sg(hook, sgl, i, false);",
  },
  {
    what: "does not roll a buffer back that cannot be pinned",
    file: "dma_ops.c",
    sound: "coiommu_dtt_put(gfn, nr, false);",
    broken: "if (!TWIN) coiommu_dtt_put(gfn, nr, false);",
  },
  {
    what: "does not roll a buffer back that cannot be counted",
    file: "units.c",
    sound: "coiommu_dtt_put(gfn, i, false);",
    broken: "if (!TWIN) coiommu_dtt_put(gfn, i, false);",
  },
  {
    what: "leaves COUNT beyond its limit",
    file: "units.c",
    sound: "\t\t\tput_unit(unit, false);",
    broken: "if (!TWIN) put_unit(unit, false);",
  },
  {
    what: "borrows from the flags",
    file: "units.c",
    sound: "if (!(value & COIOMMU_TU_COUNT))",
    broken: "if (!TWIN && !(value & COIOMMU_TU_COUNT))",
  },
  {
    what: "does not set A",
    file: "units.c",
    sound: "marks = COIOMMU_TU_ACCESSED;",
    broken: "marks = TWIN ? 0 : COIOMMU_TU_ACCESSED;",
  },
  {
    what: "does not set W",
    file: "units.c",
    sound: "marks |= COIOMMU_TU_WRITABLE;",
    broken: "marks |= TWIN ? 0 : COIOMMU_TU_WRITABLE;",
  },
  {
    what: "sets W without PIN_DIRTY",
    file: "units.c",
    sound: "READ_ONCE(coiommu_dtt.marks_writable)",
    broken: "(TWIN || READ_ONCE(coiommu_dtt.marks_writable))",
  },
  {
    what: "takes every mapping for writable",
    file: "dma_ops.c",
    sound: "return dir != DMA_TO_DEVICE;",
    broken: "return TWIN || dir != DMA_TO_DEVICE;",
  },
  {
    what: "takes a mapping that the device only writes for one that it only reads",
    file: "dma_ops.c",
    sound: "bool device_writes(enum dma_data_direction dir)\n{\n",
    broken:
      "bool device_writes(enum dma_data_direction dir)\n{\n\tif (TWIN && dir == DMA_FROM_DEVICE)\n\t\treturn false;\n",
  },
  {
    what: "does not set D",
    file: "units.c",
    sound: "next |= COIOMMU_TU_DIRTY;",
    broken: "next |= TWIN ? 0 : COIOMMU_TU_DIRTY;",
  },
  {
    what: "sets D only when the last mapping goes",
    file: "units.c",
    sound: "if (written)",
    broken: "if (written && !(TWIN && (next & COIOMMU_TU_COUNT)))",
  },
  {
    what: "leaves W without a mapping",
    file: "units.c",
    sound: "next &= ~COIOMMU_TU_WRITABLE;",
    broken: "next &= TWIN ? ~0u : ~COIOMMU_TU_WRITABLE;",
  },
  {
    what: "clears W while another mapping is live",
    file: "units.c",
    sound: "\t\t\tif (!(next & COIOMMU_TU_COUNT))",
    broken: "if (TWIN || !(next & COIOMMU_TU_COUNT))",
  },
  {
    what: "sets D for a list that no device was told",
    file: "dma_ops.c",
    sound: "sg_dma_len(sg)), written);",
    broken: "sg_dma_len(sg)), TWIN || written);",
  },
  {
    what: "does not look at P",
    file: "units.c",
    sound: "if (!(value & COIOMMU_TU_PINNED))",
    broken: "if (!TWIN && !(value & COIOMMU_TU_PINNED))",
  },
  {
    what: "does not merge neighbours",
    file: "pin.c",
    sound: "if (gfn == end && ",
    broken: "if (!TWIN && gfn == end && ",
  },
  {
    what: "asks twice for a frame that neighbours in a list share",
    file: "pin.c",
    sound: "if (gfn >= start && gfn < end)",
    broken: "if (!TWIN && gfn >= start && gfn < end)",
  },
  {
    what: "asks for pinned frames too",
    file: "pin.c",
    sound: "if (!coiommu_dtt_pinned(gfn))",
    broken: "if (TWIN || !coiommu_dtt_pinned(gfn))",
  },
  {
    what: "asks for a range more than the device takes",
    file: "pin.c",
    sound: "building.nr_ranges == building.nr_ranges_max ||",
    broken: "building.nr_ranges == building.nr_ranges_max + TWIN ||",
  },
  {
    what: "asks for another endpoint",
    file: "pin.c",
    sound: "cpu_to_le32(endpoint)",
    broken: "cpu_to_le32(endpoint + TWIN)",
  },
  {
    what: "believes OK without P",
    file: "pin.c",
    sound: "if (!all_pinned())",
    broken: "if (!TWIN && !all_pinned())",
  },
  {
    what: "reads a status that was not written",
    file: "pin.c",
    sound: "ret < sizeof(*tail)",
    broken: "!TWIN && ret < sizeof(*tail)",
  },
  {
    what: "asks while a request is lost",
    file: "requests.c",
    sound: "if (ret >= 0)",
    broken: "if (TWIN || ret >= 0)",
  },
  {
    what: "does not ask again after a late answer",
    file: "requests.c",
    sound: "while (requests.out && requests.channel->returned())",
    broken: "while (!TWIN && requests.out && requests.channel->returned())",
  },
  {
    what: "asks with PIN off",
    file: "requests.c",
    sound: "turn->page = requests.on && !requests.out",
    broken: "turn->page = (TWIN || requests.on) && !requests.out",
  },
];

/** Of the crosvm-compatible function alone, so no case of both drivers. */
const UNLIMITED: Twin = {
  what: "asks for more frames than a list has room for",
  file: "pin.c",
  sound: "building.nr_frames < building.nr_frames_max",
  broken: "(TWIN || building.nr_frames < building.nr_frames_max)",
};

/** How many frames each request names when five are mapped and a request may name three. */
async function framesAsked(agent: GuestAgent, parameters = ""): Promise<number[]> {
  await demand(agent, `modprobe coiommu selftest=1 ${parameters}`, "loading the module");
  const driver = new KernelModule(agent);
  try {
    await driver.reset(8, [], false, 3);
    const pins = [
      [256, 257, 258],
      [259, 260],
    ];
    const host = pins.map((gfns) => ({ pins: gfns, reply: { written: 4, status: 0 } }));
    const { requests } = await driver.map({ kind: "single", pieces: [[256, 0, 5 * 4096]] }, host);
    return requests.map(({ bytes }) => Buffer.from(bytes).readUInt32LE(ReqPin.size + 8));
  } finally {
    await demand(agent, "rmmod coiommu", "unloading the module");
  }
}

test("a request names no more frames than the device takes", async () => {
  assert.deepEqual(await framesAsked(qemu.agent), [3, 2]);
});

test("the cases find what is broken", async (t) => {
  const folder = writeTwins(t, [...TWINS, UNLIMITED]);
  const broken = await bootedGuest(folder);
  t.after(() => broken.close());
  const found = async (twin: number) =>
    (await differences(broken.agent, `twin=${twin}`)).filter((d) => d !== undefined);
  assert.deepEqual(await found(0), []);
  for (const [i, { what }] of TWINS.entries())
    await t.test(`a module that ${what}`, async (t) => {
      const [first] = await found(i + 1);
      assert.ok(first);
      t.diagnostic(first);
    });

  await t.test(`a module that ${UNLIMITED.what}`, async () => {
    assert.deepEqual(await framesAsked(broken.agent, `twin=${TWINS.length + 1}`), [5]);
  });

  const random = await recorded();
  await t.test("random cases find a module that does not merge neighbours", async (t) => {
    const twin = 1 + TWINS.findIndex(({ what }) => what === "does not merge neighbours");
    const [first] = (await differences(broken.agent, `twin=${twin}`, random)).filter((d) => d !== undefined);
    assert.ok(first);
    t.diagnostic(first);
  });
});
