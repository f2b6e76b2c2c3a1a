/**
 * Real pins under real DMA: random steps of a guest whose NVMe function is real, and two oracles that know nothing of
 * each other. One compares what DMA has done to memory and disk with a model, in the machine (fuzz.ts); the other is
 * QEMU's trace of what its IOMMU has blocked. Broken twins must be caught by both.
 */
import assert from "node:assert/strict";
import test, { after, before, type TestContext } from "node:test";
import { compareFaults } from "./expected-faults.ts";
import type { FuzzReport } from "./fuzz.ts";
import { ENTRY_LIMIT, NVME, VfioMachine } from "./machine.ts";
import { twins } from "./twins.ts";

const STEPS = 20_000;
const SHORT = 2000;
const FUZZ_MS = 150_000;
const seed = Number(process.env.VFIO_SEED ?? Date.now() % 2 ** 31);
const REPLAY = `VFIO_SEED=${seed} npx node --test test/vfio/fuzz.test.ts`;

let machine: VfioMachine;

before(async () => {
  machine = await VfioMachine.boot({}, console.log);
  await machine.bind(NVME);
});
after(() => machine?.close());

async function fuzz(steps: number, twin = "") {
  const printed = await machine.node(`test/vfio/fuzz.js ${NVME} ${seed} ${steps} '${twin}'`, FUZZ_MS);
  const report = JSON.parse(printed) as FuzzReport;
  const faults = machine.faults();
  return { report, faults: faults.length, ...compareFaults(faults, report.blocked) };
}

async function sound(t: TestContext, steps: number): Promise<void> {
  const { report, faults, expected, same } = await fuzz(steps);
  const { blocked, ...rest } = report;
  t.diagnostic(`${blocked.length} commands were blocked, ${faults} faults: ${JSON.stringify(rest)}`);
  assert.deepEqual([report.mistakes, report.first], [{}, []], REPLAY);
  assert.deepEqual([faults, same], [expected, expected], REPLAY);
  assert.ok(blocked.length > steps / 50 && report.spare > 0, "not much was tried");
}

test("DMA reaches what is mapped and nothing else, as memory and QEMU's trace agree", (t) => sound(t, STEPS));

test("the same where the kernel takes few mappings, so that they are made larger", async (t) => {
  await machine.run(`echo 128 >${ENTRY_LIMIT}`);
  await sound(t, SHORT);
  await machine.run(`echo 65535 >${ENTRY_LIMIT}`);
});

for (const twin of Object.keys(twins))
  test(`a host that ${twin} is caught by memory, and by the trace`, async () => {
    const { report, faults, expected, same } = await fuzz(SHORT, twin);
    assert.ok(report.mistakes.memory! > 0, REPLAY);
    assert.notEqual(faults, expected, REPLAY);
    assert.ok(same < expected, REPLAY);
  });
