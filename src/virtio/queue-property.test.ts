/** The split virtqueue: a driver against the device, and hostile rings against VIRTIO 1.2 section 2.7 spelled out. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { ram } from "../../test/support/guest.ts";
import { commands, fails, holds } from "../../test/support/property.ts";
import { NotGuestRam } from "../base/errors.ts";
import type { Gpa } from "../base/units.ts";
import type { GuestAccess, GuestMemory } from "../memory/guest-memory.ts";
import { DriverQueue, layoutAt } from "./driver-queue.ts";
import { type Buffer, type Chain, MalformedChain, type QueueLayout, SplitQueue } from "./queue.ts";

const FRAMES = 8;
const TABLES = 0x4000;

// --- a driver that keeps the rules ----------------------------------------------------------------------------------

interface Model {
  readonly size: number;
  free: number;
  added: number;
  /** By head, in the order offered, taken and given back. */
  offered: { head: number; readable: Buffer[]; writable: Buffer[] }[];
  taken: number[];
  returned: { head: number; written: number }[];
  /** Descriptors that each chain takes. */
  slots: Map<number, number>;
}
interface Rig {
  readonly driver: DriverQueue;
  readonly device: SplitQueue;
}
type Command = fc.Command<Model, Rig>;

const named = (name: string, check: Command["check"], run: Command["run"]): Command => ({
  check,
  run,
  toString: () => name,
});

const add = (readable: Buffer[], writable: Buffer[], indirect: boolean) => {
  const parts = readable.length + writable.length;
  const slots = indirect ? 1 : parts;
  return named(
    `add(${readable.length}, ${writable.length}${indirect ? ", indirect" : ""})`,
    (m) => parts > 0 && parts <= m.size && slots <= m.free,
    (m, { driver }) => {
      // A table of its own for each chain that the device has not taken.
      const at = TABLES + (m.added++ % m.size) * 16 * m.size;
      const head = driver.add(readable, writable, indirect ? at : undefined);
      m.offered.push({ head, readable, writable });
      m.slots.set(head, slots);
      m.free -= slots;
    },
  );
};
const pop = named(
  "pop",
  () => true,
  (m, { device }) => {
    const chain = device.pop();
    assert.deepEqual(chain, m.offered.shift(), "chain");
    if (chain) m.taken.push(chain.head);
  },
);
const push = (which: number, written: number) =>
  named(
    `push(${which}, ${written})`,
    (m) => m.taken.length > 0,
    (m, { device }) => {
      const [head] = m.taken.splice(which % m.taken.length, 1);
      device.push(head!, written);
      m.returned.push({ head: head!, written });
    },
  );
const poll = named(
  "poll",
  () => true,
  (m, { driver }) => {
    const back = m.returned.shift();
    assert.deepEqual(driver.poll(), back, "answer");
    if (back) m.free += m.slots.get(back.head)!;
  },
);

const buffers = fc.array(
  fc.tuple(fc.nat(2 ** 40), fc.nat(2 ** 32 - 1)).map(([gpa, length]) => ({ gpa: gpa as Gpa, length })),
  { maxLength: 3 },
);
const traffic = commands<Model, Rig>(
  [
    fc.tuple(buffers, buffers, fc.boolean()).map((a) => add(...a)),
    fc.constant(pop),
    fc.tuple(fc.nat(7), fc.nat(2 ** 32 - 1)).map((a) => push(...a)),
    fc.constant(poll),
  ],
  80,
);
const powerOfTwo = (max: number) => fc.nat(max).map((n) => 2 ** n);
/** Where both sides begin: the 16-bit indices wrap within a few steps, now and then. */
const index = fc.oneof(fc.constant(0), fc.integer({ min: 65_500, max: 65_535 }), fc.nat(65_535));

type Create = (
  memory: GuestAccess,
  layout: QueueLayout,
  options: { indirect: boolean; next: number },
) => SplitQueue;
const real: Create = (...args) => new SplitQueue(...args);

const givesEachChainBackOnce = (create: Create) =>
  fc.property(powerOfTwo(3), index, traffic, (size, next, played) =>
    fc.modelRun(() => {
      const memory = ram(FRAMES);
      const layout = layoutAt(0, size);
      for (const ring of [layout.driver, layout.device]) memory.store16(ring + 2, next);
      return {
        model: {
          size,
          free: size,
          added: 0,
          offered: [],
          taken: [],
          returned: [],
          slots: new Map<number, number>(),
        },
        real: {
          driver: new DriverQueue(memory, layout, next),
          device: create(memory, layout, { indirect: true, next }),
        },
      };
    }, played),
  );

holds(
  "each chain arrives whole and in order, and comes back once with its length",
  givesEachChainBackOnce(real),
  500,
);

fails(
  "a device that counts the used ring without wrapping",
  givesEachChainBackOnce(
    (memory, layout, options) =>
      new (class extends SplitQueue {
        #pushed = options.next;
        override push(head: number, written: number): void {
          if (this.#pushed++ <= 0xffff) super.push(head, written);
        }
      })(memory, layout, options),
  ),
  /answer/,
);

fails(
  "a device that gives back the length of the chain before",
  givesEachChainBackOnce(
    (memory, layout, options) =>
      new (class extends SplitQueue {
        #last = 0;
        override push(head: number, written: number): void {
          super.push(head, this.#last);
          this.#last = written;
        }
      })(memory, layout, options),
  ),
  /answer/,
);

// --- rings of a hostile driver --------------------------------------------------------------------------------------

interface Descriptor {
  readonly addr: number;
  readonly len: number;
  readonly flags: number;
  readonly next: number;
}
const SIZE = 8;
const LAYOUT = layoutAt(0x1000, SIZE);
const TABLE = 0x3000;

const descriptor = fc.record({
  addr: fc.oneof(
    {
      weight: 4,
      arbitrary: fc.constantFrom(TABLE, TABLE + 16, LAYOUT.desc, FRAMES * 4096 - 16, FRAMES * 4096),
    },
    { weight: 1, arbitrary: fc.constantFrom(0, 2 ** 32 + TABLE, 2 ** 52, 2 ** 63) },
  ),
  len: fc.oneof(fc.constantFrom(0, 16, 32, 64, 16 * SIZE, 16 * SIZE + 16, 24, 2 ** 32 - 16), fc.nat(300)),
  flags: fc.oneof(
    { weight: 6, arbitrary: fc.constantFrom(0, 1, 1, 1, 2, 3, 4) },
    { weight: 1, arbitrary: fc.constantFrom(5, 6, 7, 8, 0xffff) },
  ),
  next: fc.oneof(
    { weight: 6, arbitrary: fc.nat(SIZE - 1) },
    { weight: 1, arbitrary: fc.constantFrom(SIZE, 0xffff) },
  ),
});
const table = (length: number) => fc.array(descriptor, { minLength: length, maxLength: length });
const heads = fc.array(
  fc.oneof(
    { weight: 20, arbitrary: fc.nat(SIZE - 1) },
    { weight: 1, arbitrary: fc.constantFrom(SIZE, 0xffff) },
  ),
  { minLength: SIZE, maxLength: SIZE },
);
/** How far the driver claims to be ahead. */
const ahead = fc.oneof(
  { weight: 8, arbitrary: fc.nat(SIZE) },
  { weight: 1, arbitrary: fc.constantFrom(SIZE + 1, 0xffff) },
);

/** VIRTIO 1.2 sections 2.7.5 and 2.7.5.3. */
function modelChain(
  at: (gpa: number) => Descriptor | undefined,
  head: number,
  indirect: boolean,
): Chain | "malformed" {
  const readable: Buffer[] = [];
  const writable: Buffer[] = [];
  let place: { gpa: number; entries: number } = { gpa: LAYOUT.desc, entries: SIZE };
  let inTable = false;
  for (let index = head, parts = 0; parts < SIZE; ) {
    const desc = index < place.entries ? at(place.gpa + 16 * index) : undefined;
    if (!desc) return "malformed";
    if (desc.flags & 4) {
      if (!indirect || inTable || desc.flags & 1 || desc.len === 0 || desc.len % 16) return "malformed";
      place = { gpa: desc.addr, entries: desc.len / 16 };
      inTable = true;
      index = 0;
      continue;
    }
    parts++;
    const part = { gpa: desc.addr as Gpa, length: desc.len };
    if (desc.flags & 2) writable.push(part);
    else if (writable.length) return "malformed";
    else readable.push(part);
    if (!(desc.flags & 1)) return { head, readable, writable };
    index = desc.next;
  }
  return "malformed";
}

/** Counts what a device does; `times`: each access is made so often. */
class Counted implements GuestAccess {
  readonly #memory: GuestAccess;
  readonly #times: number;
  accesses = 0;
  constructor(memory: GuestAccess, times = 1) {
    this.#memory = memory;
    this.#times = times;
  }
  #do<T>(access: () => T): T {
    this.accesses++;
    for (let i = 1; i < this.#times; i++) access();
    return access();
  }
  read = (...args: Parameters<GuestAccess["read"]>) => this.#do(() => this.#memory.read(...args));
  write = (...args: Parameters<GuestAccess["write"]>) => this.#do(() => this.#memory.write(...args));
  load16 = (gpa: number) => this.#do(() => this.#memory.load16(gpa));
  store16 = (gpa: number, value: number) => this.#do(() => this.#memory.store16(gpa, value));
  transfer = (...args: Parameters<GuestAccess["transfer"]>) => this.#do(() => this.#memory.transfer(...args));
}

function descriptorAt(memory: GuestMemory, gpa: number): Descriptor | undefined {
  if (!memory.find(gpa, 16)) return undefined;
  const raw = new Uint8Array(16);
  memory.read(gpa, raw);
  const view = new DataView(raw.buffer);
  return {
    addr: Number(view.getBigUint64(0, true)),
    len: view.getUint32(8, true),
    flags: view.getUint16(12, true),
    next: view.getUint16(14, true),
  };
}

/** What pop() did, in the model's words. */
function popped(device: SplitQueue): Chain | "empty" | "malformed" | "broken" {
  try {
    return device.pop() ?? "empty";
  } catch (error) {
    if (error instanceof MalformedChain) return "malformed";
    if (error instanceof NotGuestRam) throw error;
    assert.equal((error as { code?: string }).code, "ERR_COIOMMU_PROTOCOL");
    return "broken";
  }
}

const refusesWhatTheStandardForbids = (create: Create) =>
  fc.property(
    table(SIZE),
    table(SIZE + 2),
    heads,
    ahead,
    index,
    fc.boolean(),
    (ring, inMemory, heads, ahead, next, indirect) => {
      const memory = ram(FRAMES);
      const driver = new DriverQueue(memory, LAYOUT, next);
      ring.forEach((desc, i) => void driver.describe(i, desc));
      const elsewhere = new DriverQueue(memory, { ...LAYOUT, desc: TABLE as Gpa });
      inMemory.forEach((desc, i) => void elsewhere.describe(i, desc));
      heads.forEach((head, i) => void memory.store16(LAYOUT.driver + 4 + 2 * ((next + i) % SIZE), head));
      memory.store16(LAYOUT.driver + 2, (next + ahead) & 0xffff);
      const counted = new Counted(memory);
      const device = create(counted, LAYOUT, { indirect, next });
      for (let i = 0; i <= ahead; i++) {
        const head = heads[i]!;
        const expected =
          ahead > SIZE || (i < ahead && head >= SIZE)
            ? "broken"
            : i === ahead
              ? "empty"
              : modelChain((gpa) => descriptorAt(memory, gpa), head, indirect);
        counted.accesses = 0;
        const got = popped(device);
        assert.deepEqual(got, expected, "pop");
        assert.ok(counted.accesses <= 2 + 1 + SIZE, `${counted.accesses} accesses for one chain`);
        if (got === "broken" || got === "empty") return;
        assert.equal(device.next, (next + i + 1) & 0xffff, "next");
      }
    },
  );

holds(
  "a hostile ring is refused as the standard says, in bounded steps",
  refusesWhatTheStandardForbids(real),
  3000,
);

fails(
  "a device that takes a malformed chain for an empty one",
  refusesWhatTheStandardForbids(
    (memory, layout, options) =>
      new (class extends SplitQueue {
        override pop(): Chain | undefined {
          try {
            return super.pop();
          } catch (error) {
            if (!(error instanceof MalformedChain)) throw error;
            return { head: error.head, readable: [], writable: [] };
          }
        }
      })(memory, layout, options),
  ),
  /pop/,
);

fails(
  "a device that makes each access twice",
  refusesWhatTheStandardForbids((memory, layout, options) => real(new Counted(memory, 2), layout, options)),
  /accesses for one chain/,
);
