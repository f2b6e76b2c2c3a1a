/** A device's DMA through GatedMemory, DeviceGate and SoftwareIommu, against a Set of frames. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { FakeClock } from "../../test/support/clock.ts";
import { ramRegion } from "../../test/support/guest.ts";
import { commands, fails, holds } from "../../test/support/property.ts";
import type { CoiommuError } from "../base/errors.ts";
import type { Gfn } from "../base/units.ts";
import { createIommuBuffer, DeviceGate, SoftwareIommu } from "../tracking/software-iommu.ts";
import { GatedMemory, NO_FRAME } from "./gated-memory.ts";
import { type DmaAccess, GuestMemory } from "./guest-memory.ts";

/** Frames of the table; RAM ends in its middle, so that frames may be allowed that are not RAM. */
const TABLE_FRAMES = 64;
const RAM_FRAMES = 40;

interface Model {
  readonly allowed: Set<number>;
  /** What the host pins when a device asks. */
  readonly granted: ReadonlySet<number>;
  open: boolean;
  granting: boolean;
  /** DMA windows that are open on other devices. */
  windows: number;
  readonly bytes: Uint8Array;
}
interface Rig {
  readonly iommu: SoftwareIommu;
  readonly other: DeviceGate;
  readonly dma: GatedMemory;
  readonly memory: GuestMemory;
}
type Command = fc.Command<Model, Rig>;
const always = (name: string, run: Command["run"]): Command => ({
  check: () => true,
  run,
  toString: () => name,
});

const change = (what: "allow" | "revoke", gfn: number) =>
  always(`${what}(${gfn})`, (m, { iommu }) => {
    iommu[what](gfn as Gfn);
    if (what === "allow") m.allowed.add(gfn);
    else m.allowed.delete(gfn);
  });
const setMode = (open: boolean, granting: boolean) =>
  always(`mode(${open ? "open" : "checked"}${granting ? ", granting" : ""})`, (m, { iommu }) => {
    iommu.setOpen(open);
    iommu.setGranting(granting);
    Object.assign(m, { open, granting });
  });
/** quiesce() is true exactly while no window is open: nobody closes one while it waits here. */
const quiesce = always("quiesce", (m, { iommu }) =>
  assert.equal(iommu.quiesce(), m.windows === 0, "quiesce"),
);
const toggleWindow = always("window", (m, { other }) => {
  if (m.windows) other.leave();
  else other.enter();
  m.windows = 1 - m.windows;
});

/** What DMA to [gpa, gpa + length) must end in, and the frames that are pinned for it on the way. */
function modelDma(m: Model, gpa: number, length: number): string | undefined {
  const last = Math.floor((gpa + Math.max(length, 1) - 1) / 4096);
  for (let gfn = Math.floor(gpa / 4096); gfn <= last; gfn++) {
    if (m.open || m.allowed.has(gfn)) continue;
    if (!m.granting || gfn >= TABLE_FRAMES || !m.granted.has(gfn)) return "ERR_COIOMMU_DMA_FAULT";
    m.allowed.add(gfn);
  }
  return gpa + length > RAM_FRAMES * 4096 && length > 0 ? "ERR_COIOMMU_NOT_GUEST_RAM" : undefined;
}

const dma = (what: "read" | "write", gpa: number, length: number, fill: number) =>
  always(`${what}(${gpa}, ${length})`, (m, rig) => {
    const expected = modelDma(m, gpa, length);
    const data = new Uint8Array(length).fill(fill);
    let code: string | undefined;
    try {
      rig.dma[what](gpa, data);
    } catch (error) {
      code = (error as CoiommuError).code;
      if (code === undefined) throw error;
    }
    assert.equal(code, expected, `${what} of ${length} bytes at ${gpa}`);
    if (what === "write" && !expected && length > 0) m.bytes.set(data, gpa);
    if (what === "read" && !expected) assert.deepEqual(data, m.bytes.slice(gpa, gpa + length), "bytes read");
    assert.ok(Buffer.from(m.bytes).equals(rig.memory.regions[0]!.bytes), "bytes in RAM");
  });

/** Few enough that what is changed is soon touched: ends of words, of RAM and of the table. */
const gfn = fc.constantFrom<number[]>(0, 1, 31, 32, 33, 39, 40, 63);
const gpa = fc.oneof(
  {
    weight: 8,
    arbitrary: fc.tuple(gfn, fc.constantFrom(0, 1, 4095)).map(([g, offset]) => g * 4096 + offset),
  },
  { weight: 1, arbitrary: fc.constantFrom(64 * 4096, 2 ** 32, 2 ** 44, 2 ** 44 + 4096, 2 ** 63) },
);
const length = fc.oneof(fc.nat(9), fc.nat(9000));
const played = commands<Model, Rig>(
  [
    fc.tuple(fc.constantFrom("allow", "revoke"), gfn).map(([what, g]) => change(what as "allow", g)),
    fc.tuple(fc.boolean(), fc.boolean()).map(([open, granting]) => setMode(open, granting)),
    fc.constant(setMode(false, true)),
    fc.constantFrom(quiesce, toggleWindow),
    ...(["read", "write"] as const).map((what) =>
      fc.tuple(gpa, length, fc.nat(255)).map((a) => dma(what, ...a)),
    ),
  ],
  60,
);

interface Parts {
  readonly iommu?: typeof SoftwareIommu;
  readonly gate?: typeof DeviceGate;
}
const reachesWhatTheSetHolds = ({ iommu: Iommu = SoftwareIommu, gate: Gate = DeviceGate }: Parts = {}) =>
  fc.property(fc.uniqueArray(gfn), fc.uniqueArray(gfn), played, (allowed, granted, played) =>
    fc.modelRun(() => {
      const buffer = createIommuBuffer(TABLE_FRAMES);
      const iommu = new Iommu(buffer, new FakeClock(0, 1e6));
      for (const gfn of allowed) iommu.allow(gfn as Gfn);
      const pin = (gfn: Gfn) => {
        if (granted.includes(gfn)) iommu.allow(gfn);
        return granted.includes(gfn);
      };
      const memory = new GuestMemory([ramRegion(0, RAM_FRAMES)]);
      const gate = new Gate(buffer, 0, () => iommu.serveRequests(pin));
      return {
        model: {
          allowed: new Set<number>(allowed),
          granted: new Set<number>(granted),
          open: false,
          granting: false,
          windows: 0,
          bytes: new Uint8Array(RAM_FRAMES * 4096),
        },
        real: { iommu, other: new Gate(buffer, 1, () => {}), dma: new GatedMemory(memory, gate), memory },
      };
    }, played),
  );

holds(
  "a device's DMA reaches exactly the frames that are allowed or granted, whole or not at all",
  reachesWhatTheSetHolds(),
);

class Forgetful extends SoftwareIommu {
  override revoke(gfn: Gfn): void {
    if (gfn % 32) super.revoke(gfn);
  }
}
fails(
  "an IOMMU that does not revoke the first frame of a word",
  reachesWhatTheSetHolds({ iommu: Forgetful }),
  /(read|write) of/,
);

class Wrapping extends DeviceGate {
  override translate(page: number, access: DmaAccess): Gfn | typeof NO_FRAME {
    return super.translate(page % TABLE_FRAMES, access) === NO_FRAME ? NO_FRAME : (page as Gfn);
  }
}
fails(
  "a gate that cuts frame numbers to the table's size",
  reachesWhatTheSetHolds({ gate: Wrapping }),
  /(read|write) of/,
);

class Unseen extends DeviceGate {
  override enter(): void {}
  override leave(): void {}
}
fails("a gate that opens no window", reachesWhatTheSetHolds({ gate: Unseen }), /quiesce/);
