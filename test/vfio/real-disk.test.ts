/** `coiommu run --device` as its user sees it: on a real function, behind a real IOMMU, whose trace is the oracle. */
import assert from "node:assert/strict";
import test, { after, before } from "node:test";
import type { RunResult } from "../../src/control/result.ts";
import { fieldDifferences } from "../support/result-fields.ts";
import { CHECKOUT } from "./guest.ts";
import { NVME, VfioMachine } from "./machine.ts";

const DEVICE = `/sys/bus/pci/devices/${NVME}`;
const RUN_MS = 120_000;
const READ = "fio:rw=randread,iodepth=16,seconds=1,size=8M";

let machine: VfioMachine;
before(async () => {
  machine = await VfioMachine.boot({}, console.log);
});
after(() => machine?.close());

const coiommu = (args: string) => machine.node(`bin/coiommu.js ${args}`, RUN_MS);
const onDisk = (args: string) => `run --machine embedded --memory 128M --device ${NVME} ${args}`;
const result = async (args: string): Promise<RunResult> =>
  JSON.parse(await coiommu(`${onDisk(args)} --json - 2>/dev/null`));
/** What a command says that must fail. */
const complaint = (args: string) =>
  machine.run(`cd ${CHECKOUT}; node bin/coiommu.js ${args} 2>&1 && echo went well; true`, RUN_MS);
const commandRegister = async () =>
  Number.parseInt(
    await machine.run(`dd if=${DEVICE}/config bs=1 skip=4 count=2 2>/dev/null | od -An -tx2`),
    16,
  );

/** With the guest kernel's own driver, which the function is given back to. */
async function withKernelDriver<T>(what: () => Promise<T>): Promise<T> {
  await machine.run(`[ ! -e ${DEVICE}/driver ] || echo ${NVME} >${DEVICE}/driver/unbind
echo nvme >${DEVICE}/driver_override; echo ${NVME} >/sys/bus/pci/drivers_probe
i=0; while [ ! -b /dev/nvme0n1 ]; do i=$((i+1)); [ $i -lt 100 ] || exit 1; usleep 50000; done`);
  try {
    return await what();
  } finally {
    await machine.bind(NVME);
  }
}
const digest = () => withKernelDriver(() => machine.run("md5sum </dev/nvme0n1"));

function checkSound({ workload, maps, pins, dma, kernel, device, pinner }: RunResult): void {
  assert.deepEqual([workload.errors, workload.verified, pins.refused ?? 0], [0, true, 0]);
  assert.deepEqual([device, pinner, kernel.source], [NVME, "vfio", "VmLck"]);
  assert.deepEqual(dma, { transfers: null, bytes: null, faults: null });
  assert.ok(workload.ops! > 100 && kernel.pinnedPagesPeak! > 0);
  assert.deepEqual([maps.unmap, maps.liveAtEnd ?? 0], [maps.map, 0]);
}

test("what it says of a function that the kernel's driver has is what makes it ours", async () => {
  const said = await complaint(onDisk(""));
  const [, commands] = /: it is bound to nvme, not to vfio-pci; as root: (.*)\n$/.exec(said) ?? [];
  assert.ok(commands !== undefined, said);
  await machine.run(commands);
  assert.match(await machine.run(`readlink ${DEVICE}/driver`), /\/vfio-pci\n$/);
});

test("a disk that is only read keeps what is on it, and is verified", async () => {
  await withKernelDriver(() =>
    machine.run("dd if=/dev/urandom of=/dev/nvme0n1 bs=1M count=8 2>/dev/null; sync"),
  );
  const before = await digest();
  machine.faults();
  const run = await result(`--workload ${READ}`);
  checkSound(run);
  assert.deepEqual(fieldDifferences(run), []);
  assert.ok(run.pins.framesUnpinned > 0 && run.kernel.pinnedPagesPeak! < (128 * 256) / 8);
  assert.deepEqual(machine.faults(), []);
  assert.equal(await digest(), before);
});

test("several CPUs, each with its queue: what is written is read back", async () => {
  const workload = "fio:rw=randrw,bs=16k,iodepth=8,seconds=1,size=8M";
  checkSound(await result(`--cpus 3 --overwrite-device --workload ${workload}`));
  assert.deepEqual(machine.faults(), []);
});

for (const [signal, code] of [
  ["INT", 130],
  ["KILL", 137],
] as const)
  test(`SIG${signal} in the middle: the function masters the bus no more, nothing is blocked, and the next run is well`, async () => {
    const killed = await machine.run(
      `cd ${CHECKOUT}; node bin/coiommu.js ${onDisk(`--workload ${READ.replace("seconds=1", "seconds=60")}`)} >/tmp/out 2>&1 &
p=$!; i=0; until grep -q '^running fio' /tmp/out; do i=$((i+1)); [ $i -lt 600 ] || exit 1; usleep 100000; done
sleep 1; kill -${signal} $p; wait $p; echo $?`,
      RUN_MS,
    );
    assert.match(killed, new RegExp(`^${code}\n$`, "m"));
    assert.equal((await commandRegister()) & 4, 0);
    assert.deepEqual(machine.faults(), []);
    checkSound(await result(`--workload ${READ}`));
    assert.deepEqual(machine.faults(), []);
  });

test("broken twin: a backend that unpins what is mapped is seen by the workload, and in the trace", async () => {
  const outcome = JSON.parse(await machine.node(`test/vfio/blind-run.js ${NVME}`, RUN_MS)) as
    | RunResult["workload"]
    | { failure: string };
  const seen =
    "failure" in outcome ? /does not (?:go on|answer)/.test(outcome.failure) : outcome.verified === false;
  assert.ok(seen, JSON.stringify(outcome));
  const faults = machine.faults();
  assert.ok(
    faults.length > 0 && faults.every(({ source }) => source === 0x30),
    "what is unpinned is blocked",
  );
  assert.equal((await commandRegister()) & 4, 0);
});
