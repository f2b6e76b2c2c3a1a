import assert from "node:assert/strict";
import test from "node:test";
import { ram } from "../../test/support/guest.ts";
import type { Gfn } from "../base/units.ts";
import { type DmaGate, GatedMemory } from "./gated-memory.ts";
import { GuestMemory } from "./guest-memory.ts";

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
  allows(gfn: Gfn): boolean {
    this.log.push(`allows ${gfn}`);
    return this.mapped.has(gfn);
  }
  request(gfn: Gfn): boolean {
    assert.equal(this.open, 0, "a device that waits must not hold its window open");
    this.log.push(`request ${gfn}`);
    if (this.grants.get(gfn) === "pin") this.mapped.add(gfn);
    return this.grants.has(gfn);
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
  ["transfer", (m, gpa) => m.transfer(gpa, 2, () => {})],
  ["load16", (m, gpa) => m.load16(gpa)],
  ["store16", (m, gpa) => m.store16(gpa, 1)],
];
for (const [name, access] of accesses) {
  test(`${name} of a mapped frame happens inside a DMA window`, () => {
    const gate = new LoggedGate([1]);
    access(new GatedMemory(LoggedMemory.of(4, gate), gate), 0x1000);
    assert.deepEqual(gate.log, ["enter", "allows 1", "access", "leave"]);
  });
  test(`${name} of a frame that is not mapped faults, and the window is closed before the host is asked`, () => {
    const gate = new LoggedGate([0, 1]);
    assert.throws(() => access(new GatedMemory(LoggedMemory.of(4, gate), gate), 0x2000), {
      ...FAULT,
      gpa: 0x2000,
    });
    assert.deepEqual(gate.log, ["enter", "allows 2", "leave", "request 2"]);
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
      gpa: missing * 4096,
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
  const window = (...checked: number[]) => ["enter", ...checked.map((gfn) => `allows ${gfn}`)];
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
  assert.equal(gate.open, 0);
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
  assert.throws(() => new GatedMemory(ram(8), gate).transfer(0x1000, 1, broken), RangeError);
  assert.equal(gate.open, 0);
});
