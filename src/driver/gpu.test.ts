import assert from "node:assert/strict";
import test from "node:test";
import { EarlyUnmap, JoiningDma } from "../../test/support/dma.ts";
import { flipping } from "../../test/support/flip.ts";
import { type GpuRigOptions, gpuRig } from "../../test/support/gpu.ts";
import { random } from "../../test/support/random.ts";
import type { Gpa } from "../base/units.ts";
import { GPU_BUS_ERROR, GPU_NO_PAGE } from "../wire/gpu.ts";
import { isStamped, stamp } from "../wire/stamp.ts";

const PAGES = 64;
const CHUNK = 512;
const CHUNKS = (PAGES * 4096) / CHUNK;

/** A binding of scattered frames, each piece of 512 bytes stamped with its number; and a model of what is where. */
function setUp(options: GpuRigOptions = {}) {
  const r = gpuRig(options);
  const next = random(5);
  const frames = Array.from({ length: PAGES }, (_, i) => 0x80_0000 + 4096 * ((i * 37) % 256));
  const at = (chunk: number) => frames[Math.floor((chunk * CHUNK) / 4096)]! + ((chunk * CHUNK) % 4096);
  const chunk = new Uint8Array(CHUNK);
  for (let i = 0; i < CHUNKS; i++) {
    stamp(chunk, i, 0);
    r.memory.write(at(i), chunk);
  }
  const binding = r.driver.bind(
    10,
    frames.map((gpa) => ({ gpa: gpa as Gpa, length: 4096 })),
  );
  const model = Array.from({ length: CHUNKS }, (_, i) => i);
  const errors: number[] = [];
  const copy = (source: number, target: number, chunks: number) =>
    r.driver.copy({
      source: 10 * 4096 + source * CHUNK,
      target: 10 * 4096 + target * CHUNK,
      length: chunks * CHUNK,
      done: (error) => {
        errors.push(error);
        if (error === 0) model.splice(target, chunks, ...model.slice(source, source + chunks));
      },
    });
  const settle = () => {
    for (let turn = 0; r.driver.pending > 0 && turn < 10_000; turn++) {
      r.gpu.run(3);
      r.driver.poll();
    }
    assert.equal(r.driver.pending, 0);
  };
  /** Chunks that are not what the model says. */
  const wrong = () =>
    model.flatMap((number, i) => {
      r.memory.read(at(i), chunk);
      return isStamped(chunk, number, 0) ? [] : [i];
    });
  const churn = (count: number) => {
    for (let i = 0; i < count; i++) {
      const chunks = 1 + next(128);
      copy(next(CHUNKS - chunks), next(CHUNKS - chunks), chunks);
    }
    settle();
  };
  return { ...r, binding, errors, copy, settle, wrong, churn };
}

test("random copies, overlapping ones too, leave what the model says, over many rounds of the ring", () => {
  const r = setUp();
  r.churn(200);
  assert.deepEqual([r.wrong(), r.errors], [[], new Array(200).fill(0)]);
  assert.deepEqual([r.counters.requests, r.counters.faults, r.counters.errors], [200, 0, 0]);
  r.driver.unbind(r.binding);
  r.driver.close();
  assert.deepEqual([r.dma.live, r.pages.used], [0, 0]);
});

test("a mapping with fewer segments than frames", () => {
  const r = gpuRig({ Dma: JoiningDma });
  const list = [0x80_0000, 0x80_1000, 0x90_0000].map((gpa) => ({ gpa: gpa as Gpa, length: 4096 }));
  const binding = r.driver.bind(3, list);
  assert.deepEqual([binding.segments.length, binding.pages], [2, 3]);
  const data = new Uint8Array(4096);
  stamp(data, 1, 1);
  r.memory.write(0x90_0000, data);
  r.driver.copy({
    source: 5 * 4096,
    target: 4 * 4096,
    length: 4096,
    done: (error) => assert.equal(error, 0),
  });
  r.gpu.run(1);
  assert.equal(r.driver.poll(), 1);
  r.memory.read(0x80_1000, data);
  assert.ok(isStamped(data, 1, 1));
});

test("a copy to where nothing is bound any more is refused", () => {
  const r = setUp();
  r.driver.unbind(r.binding);
  r.copy(0, 100, 4);
  r.settle();
  assert.deepEqual([r.errors, r.counters.errors, r.counters.faults], [[GPU_NO_PAGE], 1, 0]);
});

test("a binding that cannot be mapped leaves no trace", () => {
  const r = gpuRig();
  const live = r.dma.live;
  r.dma.failEvery = 1;
  assert.throws(() => r.driver.bind(0, [{ gpa: 0x80_0000 as Gpa, length: 8192 }]), {
    code: "ERR_COIOMMU_DMA_MAP",
  });
  assert.equal(r.dma.live, live);
  const entries = new Uint8Array(16);
  r.memory.read(r.driver.table, entries);
  assert.deepEqual([...entries], new Array(16).fill(0));
});

test("a ring without a table is given back", () => {
  class Second extends EarlyUnmap {
    override failEvery = 2;
  }
  assert.throws(() => gpuRig({ Dma: Second }), { code: "ERR_COIOMMU_DMA_MAP" });
});

test("broken twin: a driver that unmaps too early gets DMA faults", () => {
  const r = setUp({ Dma: EarlyUnmap });
  r.churn(3);
  assert.deepEqual([r.errors, r.counters.faults], [new Array(3).fill(GPU_BUS_ERROR), 3]);
});

test("broken twin: a copy engine with one wrong bit is noticed", () => {
  const r = setUp({ access: flipping(50) });
  r.churn(20);
  assert.notDeepEqual(r.wrong(), []);
});
