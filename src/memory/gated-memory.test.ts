import assert from "node:assert/strict";
import test from "node:test";
import { ram } from "../../test/support/guest.ts";
import type { Gfn } from "../base/units.ts";
import { type DmaGate, GatedMemory, NO_FRAME } from "./gated-memory.ts";
import { type DmaAccess, GuestMemory } from "./guest-memory.ts";

const FAULT = { code: "ERR_COIOMMU_DMA_FAULT" };

/** An IOMMU that logs what a device asks, and maps `mapped`. */
class LoggedGate implements DmaGate {
  readonly log: string[] = [];
  readonly mapped: Set<number>;
  /** Frames that are mapped when the device asks; "lie": says so, but does not. */
  readonly grants: Map<number, "pin" | "lie">;
  open = 0;
  constructor(mapped: number[], grants: [number, "pin" | "lie"][] = []) {
    this.mapped = new Set(mapped);
    this.grants = new Map(grants);
  }
  enter(): void {
    this.open++;
    this.log.push("enter");
  }
  leave(): void {
    this.open--;
    this.log.push("leave");
  }
  translate(page: number): Gfn | typeof NO_FRAME {
    this.log.push(`translate ${page}`);
    return this.mapped.has(page) ? (page as Gfn) : NO_FRAME;
  }
  request(gfn: Gfn): boolean {
    assert.equal(this.open, 0, "a device that waits must not hold its window open");
    this.log.push(`request ${gfn}`);
    if (this.grants.get(gfn) === "pin") this.mapped.add(gfn);
    return this.grants.has(gfn);
  }
  fault(address: number, access: DmaAccess): void {
    this.log.push(`fault ${access} ${address}`);
  }
}

/** Memory that logs its accesses into the gate's log. */
class LoggedMemory extends GuestMemory {
  #log: string[] = [];
  static of(frames: number, gate: LoggedGate): LoggedMemory {
    const m = new LoggedMemory(ram(frames).regions);
    m.#log = gate.log;
    return m;
  }
  override transfer(...args: Parameters<GuestMemory["transfer"]>): void {
    this.#log.push("access");
    super.transfer(...args);
  }
  override load16(gpa: number): number {
    this.#log.push("access");
    return super.load16(gpa);
  }
  override store16(gpa: number, value: number): void {
    this.#log.push("access");
    super.store16(gpa, value);
  }
}

const accesses: readonly [string, (m: GatedMemory, gpa: number) => void][] = [
  ["read", (m, gpa) => m.read(gpa, new Uint8Array(2))],
  ["write", (m, gpa) => m.write(gpa, Uint8Array.of(1, 2))],
  ["transfer", (m, gpa) => m.transfer(gpa, 2, () => {}, "write")],
  ["load16", (m, gpa) => m.load16(gpa)],
  ["store16", (m, gpa) => m.store16(gpa, 1)],
];
for (const [name, access] of accesses) {
  test(`${name} of a mapped frame happens inside a DMA window`, () => {
    const gate = new LoggedGate([1]);
    access(new GatedMemory(LoggedMemory.of(4, gate), gate), 0x1000);
    assert.deepEqual(gate.log, ["enter", "translate 1", "access", "leave"]);
  });
  test(`${name} of a frame that is not mapped faults, and the window is closed before the host is asked`, () => {
    const gate = new LoggedGate([0, 1]);
    assert.throws(() => access(new GatedMemory(LoggedMemory.of(4, gate), gate), 0x2000), {
      ...FAULT,
      gpa: 0x2000,
    });
    const kind = ["write", "transfer", "store16"].includes(name) ? "write" : "read";
    assert.deepEqual(gate.log, ["enter", "translate 2", "leave", "request 2", `fault ${kind} ${0x2000}`]);
  });
  test(`${name} of a frame that is mapped but not RAM leaves no window open`, () => {
    const gate = new LoggedGate([100]);
    assert.throws(() => access(new GatedMemory(LoggedMemory.of(4, gate), gate), 100 * 4096), {
      code: "ERR_COIOMMU_NOT_GUEST_RAM",
    });
    assert.equal(gate.open, 0);
  });
}

test("nothing is transferred when any frame of the range is not mapped", () => {
  for (const missing of [1, 2, 3]) {
    const gate = new LoggedGate([1, 2, 3].filter((gfn) => gfn !== missing));
    const memory = ram(8);
    const gated = new GatedMemory(memory, gate);
    assert.throws(() => gated.write(0x1800, new Uint8Array(0x2000).fill(1)), {
      ...FAULT,
      gpa: missing === 1 ? 0x1800 : missing * 4096,
    });
    assert.ok(memory.regions[0]!.bytes.every((b) => b === 0));
  }
});

test("a frame that the host pins when asked is transferred, with all frames checked again", () => {
  const gate = new LoggedGate(
    [1],
    [
      [2, "pin"],
      [3, "pin"],
    ],
  );
  new GatedMemory(LoggedMemory.of(8, gate), gate).write(0x1800, new Uint8Array(0x2000));
  const window = (...checked: number[]) => ["enter", ...checked.map((gfn) => `translate ${gfn}`)];
  assert.deepEqual(gate.log, [
    ...[...window(1, 2), "leave", "request 2"],
    ...[...window(1, 2, 3), "leave", "request 3"],
    ...[...window(1, 2, 3), "access", "leave"],
  ]);
});

test("a host that says it pinned and did not ends in a fault, not in a loop", () => {
  const gate = new LoggedGate(
    [],
    [
      [1, "lie"],
      [2, "lie"],
    ],
  );
  assert.throws(() => new GatedMemory(ram(8), gate).read(0x1000, new Uint8Array(0x2000)), FAULT);
  assert.deepEqual([gate.open, gate.log.at(-1)], [0, "fault read 4096"]);
});

test("an access of no bytes is checked like one of one byte", () => {
  const gate = new LoggedGate([]);
  assert.throws(() => new GatedMemory(ram(8), gate).read(0x1000, new Uint8Array(0)), FAULT);
});

test("an exception of the device's own code inside a transfer closes the window", () => {
  const gate = new LoggedGate([1]);
  const broken = () => {
    throw new RangeError("device");
  };
  assert.throws(() => new GatedMemory(ram(8), gate).transfer(0x1000, 1, broken, "read"), RangeError);
  assert.equal(gate.open, 0);
});

// --- translation ----------------------------------------------------------------------------------------------------------

/** An IOMMU that maps page -> frame, pages of `readOnly` for reading alone. */
function translating(pages: Record<number, number>, readOnly: number[] = []) {
  const memory = ram(8);
  memory.regions[0]!.bytes.forEach((_, i, all) => {
    all[i] = i >> 12;
  });
  const faults: [address: number, access: DmaAccess][] = [];
  const gate: DmaGate = {
    enter() {},
    leave() {},
    translate: (page, access) =>
      access === "write" && readOnly.includes(page) ? NO_FRAME : ((pages[page] ?? NO_FRAME) as Gfn),
    request: () => false,
    fault: (address, access) => void faults.push([address, access]),
  };
  return { memory, gated: new GatedMemory(memory, gate), faults };
}
/** The frames that bytes came from, with how many of each. */
const runs = (bytes: Uint8Array) => [...bytes].reduce((n, b) => n.set(b, (n.get(b) ?? 0) + 1), new Map());

test("pages that follow each other in guest memory are one piece, wherever they are", () => {
  const { gated } = translating({ 100: 3, 101: 4 });
  const pieces: number[][] = [];
  gated.transfer(100 * 4096 + 9, 5000, (piece, done) => pieces.push([piece[0]!, done, piece.length]), "read");
  assert.deepEqual(pieces, [[3, 0, 5000]]);
});

test("pages that are apart in guest memory are read, written and transferred as one range", () => {
  const { gated, memory } = translating({ 2: 7, 3: 1, 4: 2, 5: 0 });
  const into = new Uint8Array(3 * 4096);
  gated.read(2 * 4096 + 4000, into);
  assert.deepEqual(
    [...runs(into)],
    [
      [7, 96],
      [1, 4096],
      [2, 4096],
      [0, 4000],
    ],
  );
  const pieces: number[][] = [];
  gated.transfer(2 * 4096 + 4000, 4200, (p, done) => pieces.push([p[0]!, done, p.length]), "read");
  assert.deepEqual(pieces, [
    [7, 0, 96],
    [1, 96, 4096],
    [2, 4192, 8],
  ]);
  gated.write(3 * 4096 - 1, Uint8Array.of(50, 51));
  assert.deepEqual([memory.regions[0]!.bytes[8 * 4096 - 1], memory.regions[0]!.bytes[4096]], [50, 51]);
  gated.store16(2 * 4096 + 2, 0x1234);
  assert.deepEqual([gated.load16(2 * 4096 + 2), memory.load16(7 * 4096 + 2)], [0x1234, 0x1234]);
});

for (const [name, access] of [
  ["write", (m: GatedMemory) => m.write(2 * 4096, new Uint8Array(8192))],
  ["transfer", (m: GatedMemory) => m.transfer(2 * 4096, 8192, (p) => p.fill(9), "write")],
  ["store16", (m: GatedMemory) => m.store16(3 * 4096, 9)],
] as const)
  test(`${name} to a page that is mapped for reading alone faults, and nothing is written`, () => {
    const { gated, memory, faults } = translating({ 2: 6, 3: 1 }, [3]);
    assert.throws(() => access(gated), { ...FAULT, gpa: 3 * 4096 });
    assert.deepEqual(faults, [[3 * 4096, "write"]]);
    assert.ok(memory.regions[0]!.bytes.every((b, i) => b === i >> 12));
    gated.read(3 * 4096, new Uint8Array(1));
  });

test("a fault behind pages that are apart is told of its own page, once", () => {
  const { gated, faults } = translating({ 2: 7, 3: 1 });
  assert.throws(() => gated.read(2 * 4096 + 9, new Uint8Array(9000)), { ...FAULT, gpa: 4 * 4096 });
  assert.deepEqual(faults, [[4 * 4096, "read"]]);
});

test("a range of which a later page leads outside RAM is not transferred in part", () => {
  const { gated, memory } = translating({ 2: 6, 3: 900 });
  assert.throws(() => gated.write(2 * 4096, new Uint8Array(8192).fill(9)), {
    code: "ERR_COIOMMU_NOT_GUEST_RAM",
  });
  assert.ok(memory.regions[0]!.bytes.every((b, i) => b === i >> 12));
});
