/** A live migration without its network: memory is copied in rounds while a disk writes it, by what harvests tell. */
import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type TestContext, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { UserError } from "../../src/base/errors.ts";
import { milliseconds } from "../../src/base/units.ts";
import { EmbeddedMachine } from "../../src/control/embedded.ts";
import type { EmbeddedOptions } from "../../src/control/embedded-plan.ts";
import { parseWorkload } from "../../src/control/workload.ts";
import { ramRegions } from "../../src/machine/embedded/ram.ts";

const FRAME = 4096;
const options: EmbeddedOptions = {
  memoryMiB: 128,
  cpus: 2,
  strategy: "coiommu",
  policy: "lru",
  interval: milliseconds(20),
  quota: Number.POSITIVE_INFINITY,
  beforeActivation: "none",
  activationTimeout: Number.POSITIVE_INFINITY,
  pinner: "software",
  disk: { sizeMiB: 64 },
  workload: parseWorkload("fio:rw=randread,seconds=2,size=8M"),
};
const entry = (name: string) => new URL(`./${name}.ts`, import.meta.url);

interface Migration {
  /** Frames that the disk wrote, and those of them that the copy has otherwise. */
  readonly written: number;
  readonly wrong: readonly number[];
  readonly rounds: number;
  readonly unpinned: number;
  /** Frames in a harvest when all is unmapped and has been harvested. */
  readonly left: number;
}

async function migrate(t: TestContext, overrides: Partial<EmbeddedOptions> = {}): Promise<Migration> {
  const folder = mkdtempSync(join(tmpdir(), "coiommu-migration-"));
  t.after(() => rmSync(folder, { recursive: true }));
  const written = join(folder, "written");
  writeFileSync(written, "");
  process.env.COIOMMU_TEST_WRITTEN = written;
  const machine = await EmbeddedMachine.start({
    ...options,
    deviceEntry: entry("recording-device"),
    ...overrides,
  });
  t.after(() => machine.close().catch(() => {}));
  await machine.resume();
  await machine.boot();
  const working = machine.work(options.workload);
  let over = false;
  void working.finally(() => {
    over = true;
  });

  await sleep(500);
  const live = ramRegions(machine.ram)[0]!.bytes;
  const copy = new Uint8Array(live.length);
  await machine.dirty.start();
  copy.set(live);
  const round = async (): Promise<number> => {
    const ranges = await machine.dirty.harvest();
    let frames = 0;
    for (let i = 0; i < ranges.length; i += 2) {
      const first = ranges[i]! * FRAME;
      const end = first + ranges[i + 1]! * FRAME;
      copy.set(live.subarray(first, end), first);
      frames += ranges[i + 1]!;
    }
    return frames;
  };
  let rounds = 0;
  for (; !over; rounds++) {
    await round();
    await sleep(30);
  }
  const { workload } = await working;
  assert.equal(workload.errors, 0);

  // The CPUs have unmapped all, so the disk is still: stop and copy.
  await round();
  const left = await round();
  await machine.dirty.stop();
  const frames = readFileSync(written, "utf8").trim().split("\n").map(Number);
  const at = (memory: Uint8Array, gfn: number) => memory.subarray(gfn * FRAME, (gfn + 1) * FRAME);
  const wrong = frames.filter((gfn) => Buffer.compare(at(live, gfn), at(copy, gfn)) !== 0);
  return { written: frames.length, wrong, rounds, unpinned: machine.pins.framesUnpinned, left };
}

test("after the last round, every frame that the disk wrote is copied as it is", async (t) => {
  const { wrong, ...seen } = await migrate(t);
  t.diagnostic(JSON.stringify(seen));
  assert.deepEqual(wrong, []);
  assert.equal(seen.left, 0, "and nothing is told twice");
  assert.ok(seen.written > 500 && seen.rounds > 20 && seen.unpinned > 100);
});

test("a harvest that forgets D is found out", async (t) => {
  const { wrong, written } = await migrate(t, { backendEntry: entry("forgetful-backend") });
  t.diagnostic(`${wrong.length} of ${written} frames are wrong`);
  assert.ok(wrong.length > 0);
});

test("without a start, and without an IOMMU, there is nothing to harvest", async (t) => {
  const refused = async (
    overrides: Partial<EmbeddedOptions>,
    action: (m: EmbeddedMachine) => Promise<unknown>,
  ) => {
    const machine = await EmbeddedMachine.start({ ...options, ...overrides });
    t.after(() => machine.close().catch(() => {}));
    const error = await action(machine).then(
      () => assert.fail("it went well"),
      (e: unknown) => e,
    );
    assert.ok(error instanceof UserError);
    return error.message;
  };
  assert.equal(await refused({}, (m) => m.dirty.harvest()), "dirty tracking has not been started");
  assert.match(await refused({ strategy: "none" }, (m) => m.dirty.start()), /there is no IOMMU/);
});

test("everything is pinned: every frame of memory is told, each time", async (t) => {
  const machine = await EmbeddedMachine.start({ ...options, memoryMiB: 64, strategy: "static" });
  t.after(() => machine.close().catch(() => {}));
  await machine.dirty.start();
  for (let i = 0; i < 2; i++) {
    const ranges = await machine.dirty.harvest();
    const frames = ranges.reduce((sum, n, at) => sum + (at % 2 ? n : 0), 0);
    assert.equal(frames, (64 * 2 ** 20) / FRAME);
  }
});
