/** `coiommu run --machine embedded` as its user sees it. */
import assert from "node:assert/strict";
import { mkdtempSync, rmSync, statSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import type { CompareResult, RunResult } from "../../src/control/result.ts";
import { FRONT_ENDS } from "../../src/virtio/front-end.ts";
import { Cli, complaint } from "../support/cli.ts";
import { fieldDifferences } from "../support/result-fields.ts";

const EMBEDDED = ["run", "--machine", "embedded", "--memory", "256M", "--interval", "200ms"];

async function result(...args: string[]): Promise<RunResult> {
  const { code, stdout, stderr } = await new Cli([...EMBEDDED, "--json", "-", ...args]).ended;
  assert.equal(code, 0, stderr);
  return JSON.parse(stdout) as RunResult;
}

/** What holds for every run that went well, whatever it did. */
function checkSound({ workload, dma, maps, pins, strategy, guest, kernel }: RunResult): void {
  assert.deepEqual([guest.machine, guest.kernel], ["embedded", null]);
  assert.deepEqual([workload.errors, dma.faults], [0, 0]);
  const { mapRequests, unmapRequests, exits, ...mappings } = maps;
  const ofPins = [pins.requests, pins.refused];
  const ofDomains = [mapRequests, unmapRequests, exits];
  if (strategy === "none" || strategy === "static") {
    assert.deepEqual([...new Set([...Object.values(mappings), ...ofPins, ...ofDomains])], [null]);
    return;
  }
  assert.ok(maps.map! > 0);
  assert.deepEqual([maps.liveAtEnd, maps.unmap, maps.framesUnmapped], [0, maps.map, maps.framesMapped]);
  if (strategy !== "coiommu") {
    assert.deepEqual(ofPins, [null, null]);
    assert.ok(mapRequests! >= maps.map! && exits! >= mapRequests! + unmapRequests!);
    // Neighbours that wait together are taken back together.
    if (strategy === "viommu-lazy") assert.ok(unmapRequests! < maps.unmap!);
    else assert.ok(unmapRequests! >= maps.unmap!); // one that a busy device delays is made again
    assert.equal(pins.framesAtEnd, 0, "what is unmapped is not pinned");
  } else assert.deepEqual(ofDomains, [null, null, null]);
  assert.equal(pins.framesAtEnd, pins.framesPinned - pins.framesUnpinned);
  assert.equal(kernel.source, "none");
}

const READ = "fio:rw=randread,bs=4k,iodepth=16,seconds=1,size=8M";
for (const [strategy, workload, frontEnd = "virtio-iommu"] of [
  ["none", READ],
  ["static", READ],
  ["none", "nic:mode=recycled,seconds=1"],
  ["static", "gpu:buffers=2,size=2M,hold=200,seconds=1"],
  ["viommu-strict", READ],
  ["viommu-strict", "fio:rw=randrw,bs=64k,iodepth=8,seconds=1,size=8M"],
  ["viommu-lazy", READ],
  ["viommu-lazy", "nic:mode=fresh,traffic=loopback,seconds=1"],
  ["viommu-lazy", "gpu:buffers=2,size=2M,hold=200,seconds=1"],
  ["coiommu", READ],
  ["coiommu", "fio:rw=randrw,bs=16k,iodepth=4,seconds=1,size=8M"],
  ["coiommu", "nic:mode=fresh,traffic=loopback,seconds=1"],
  ["coiommu", "gpu:buffers=2,size=2M,hold=200,seconds=1"],
  ["none", READ, "crosvm"],
  ["static", READ, "crosvm"],
  ["coiommu", READ, "crosvm"],
  ["coiommu", "fio:rw=randrw,bs=16k,iodepth=4,seconds=1,size=8M", "crosvm"],
  ["coiommu", "nic:mode=fresh,traffic=loopback,seconds=1", "crosvm"],
  ["coiommu", "gpu:buffers=2,size=2M,hold=200,seconds=1", "crosvm"],
] as const)
  test(`${strategy}, ${workload}, ${frontEnd}: nothing is lost, and the JSON is that of a VM`, async () => {
    const run = await result("--strategy", strategy, "--workload", workload, "--front-end", frontEnd);
    checkSound(run);
    assert.deepEqual(fieldDifferences(run), []);
    assert.ok(run.workload.ops! > 0 && run.workload.verified === true && run.dma.bytes! > 0);
    const { framesPeak } = run.pins;
    if (strategy === "static") assert.equal(framesPeak, 65_536);
    else assert.ok(strategy === "none" ? framesPeak === 0 : framesPeak > 0 && framesPeak < 65_536 / 4);
  });

test("--before-activation all: everything is pinned before the guest starts, and let go of when its driver is there", async () => {
  const run = await result("--before-activation", "all", "--workload", READ);
  checkSound(run);
  assert.equal(run.pins.framesPeak, 65_536);
  assert.ok(run.creation.pinMs > 0);
  assert.ok(run.pins.framesUnpinned > 65_536 / 2 && run.pins.framesAtEnd < 65_536 / 4);
});

test("--before-activation all with a quota below what the guest has is refused", async () => {
  const ended = await new Cli([...EMBEDDED, "--before-activation", "all", "--quota", "50%"]).ended;
  assert.equal(ended.code, 1);
  assert.match(complaint(ended), /--quota cannot be below 65536 frames/);
});

for (const workload of [
  "fio:rw=randrw,bs=4k,iodepth=8,seconds=2,size=8M",
  "nic:mode=fresh,traffic=loopback,seconds=2",
  "gpu:buffers=2,size=2M,hold=200,seconds=2",
])
  test(`fault-capable, ${workload}: only rings are mapped, buffers are pinned by faults, and lazily unpinned`, async () => {
    const run = await result("--fault-capable", "--workload", workload);
    checkSound(run);
    assert.ok(run.workload.verified === true && run.dma.transfers! > 0);
    const { requests, framesFaulted, framesPinned, framesUnpinned } = run.pins;
    assert.ok(run.maps.framesMapped! < framesFaulted! / 10);
    assert.ok(framesPinned <= framesFaulted! + run.maps.framesMapped!);
    assert.ok(requests! <= run.maps.map! && framesUnpinned > 0);
  });

test("the check of the JSON's fields finds one too many and one too few", async () => {
  const run = await result("--workload", "idle:seconds=1");
  assert.deepEqual(fieldDifferences(run), []);
  const { fault, ...dma } = { ...run.dma, fault: 0 };
  assert.deepEqual(fieldDifferences({ ...run, dma: { transfers: 0, bytes: 0, fault } }), [
    "dma.faults is missing",
    "dma.fault is not a field",
  ]);
  assert.deepEqual(fieldDifferences({ ...run, dma, pins: { ...run.pins, requests: { all: 1 } } }), [
    "pins.requests is missing",
    "pins.requests.all is not a field",
  ]);
});

for (const frontEnd of FRONT_ENDS) {
  for (const workload of ["fio:rw=randrw,seconds=1,size=8M", "nic:mode=half,traffic=loopback,seconds=1"])
    test(`several CPUs, ${frontEnd}: ${workload}`, async () => {
      const run = await result("--cpus", "3", "--workload", workload, "--front-end", frontEnd);
      checkSound(run);
      assert.equal(run.workload.verified, true);
    });

  test(`a quota that is too small for the workload is reached, refuses pins, and nothing is lost: ${frontEnd}`, async () => {
    const workload = "fio:rw=randrw,bs=64k,iodepth=32,seconds=1,size=16M";
    const run = await result("--quota", "512", "--workload", workload, "--front-end", frontEnd);
    checkSound(run);
    assert.ok(run.pins.refused! > 0, "some pins were refused");
    const { framesPeak, quotaFrames, framesClaimed, framesNeverTransferred } = run.pins;
    assert.deepEqual([run.workload.verified, quotaFrames, framesPeak], [true, 512, 512]);
    assert.ok(framesNeverTransferred! <= framesClaimed! / 20, "what it has it uses");
  });
}

for (const speculate of ["neighbours", "stride"])
  test(`--speculate ${speculate}: a network card that fills its rings asks for less than half of its frames`, async () => {
    const workload = "nic:mode=fresh,traffic=loopback,seconds=1";
    const [without, run] = [
      await result("--workload", workload),
      await result("--workload", workload, "--speculate", speculate),
    ];
    checkSound(run);
    assert.equal(run.workload.verified, true);
    const { framesSpeculative, speculation, requests } = run.pins;
    assert.equal(speculation!.name, speculate);
    assert.ok(speculation!.saved > 100 && speculation!.saved + speculation!.wasted <= framesSpeculative!);
    assert.ok(requests! < without.pins.requests! / 2, `${requests} and ${without.pins.requests} requests`);
    assert.deepEqual([without.pins.framesSpeculative, without.pins.speculation!.saved], [0, 0]);
  });

test("--speculate ghost: buffers of a disk that come back are pinned before they are asked for", async () => {
  const workload = "fio:rw=randrw,bs=16k,iodepth=8,seconds=3,size=16M";
  const run = await result("--workload", workload, "--speculate", "ghost", "--interval", "100ms");
  checkSound(run);
  assert.equal(run.workload.verified, true);
  assert.ok(run.pins.speculation!.saved > 0, JSON.stringify(run.pins));
});

test("speculation that loses says so in one line, with the figures, and in the result", async () => {
  const args = [
    "--workload",
    "gpu:buffers=2,size=2M,hold=200,seconds=2",
    "--speculate",
    "neighbours,judged=16",
  ];
  const { code, stdout, stderr } = await new Cli([...EMBEDDED, "--json", "-", ...args]).ended;
  assert.equal(code, 0, stderr);
  const { speculation } = (JSON.parse(stdout) as RunResult).pins;
  assert.match(speculation!.stopped!, /^of the last 16 frames that it pinned, the guest used \d$/);
  const told = stderr.split("\n").filter((line) => line.includes("--speculate"));
  assert.equal(told.length, 1, stderr);
  assert.ok(
    told[0]!.includes(`--speculate neighbours,judged=16 has switched itself off: ${speculation!.stopped}`),
  );
});

test("an image is the disk's backing, and keeps its size", async (t) => {
  const directory = mkdtempSync(join(tmpdir(), "coiommu-test-"));
  t.after(() => rmSync(directory, { recursive: true }));
  const image = join(directory, "disk.img");
  writeFileSync(image, "");
  truncateSync(image, 8 * 2 ** 20);
  const run = await result("--disk", image, "--workload", "fio:rw=randwrite,seconds=1");
  checkSound(run);
  assert.equal(run.workload.verified, true);
  assert.ok(statSync(image).size === 8 * 2 ** 20 && statSync(image).blocks > 0);
});

test("real pins: the kernel counts what we do", async () => {
  const run = await result("--pinner", "io_uring", "--workload", "fio:seconds=1,size=8M");
  assert.deepEqual([run.workload.verified, run.dma.faults, run.kernel.source], [true, 0, "VmPin"]);
  assert.ok(run.kernel.pinnedPagesPeak! > 0 && run.kernel.pinnedPagesPeak! <= run.pins.framesPeak);
});

test("compare: every strategy, in one JSON", async () => {
  const args = ["--rounds", "1", "--memory", "256M", "--workload", "fio:seconds=1,size=8M", "--json", "-"];
  const { code, stdout, stderr } = await new Cli(["compare", "--machine", "embedded", ...args]).ended;
  assert.equal(code, 0, stderr);
  const { runs } = JSON.parse(stdout) as CompareResult;
  assert.deepEqual(
    runs.map((run) => run.strategy),
    ["none", "static", "coiommu"],
  );
  runs.forEach(checkSound);
});

for (const [signal, code] of [
  ["SIGINT", 130],
  ["SIGTERM", 143],
] as const)
  test(`${signal} ends the guest in the middle of its work`, async () => {
    const cli = new Cli([...EMBEDDED, "--workload", "fio:rw=randrw,seconds=600"]);
    await cli.said("running fio");
    const began = performance.now();
    cli.child.kill(signal);
    const ended = await cli.ended;
    assert.equal(ended.code, code);
    assert.match(complaint(ended), new RegExp(`${signal}: ending the guest`));
    assert.ok(performance.now() - began < 5000, "at once");
  });

/** Makes every `require("koffi")` of the process and its threads fail, as where no binary fits. */
const WITHOUT_KOFFI = `--import=data:text/javascript,${encodeURIComponent(
  `import module from "node:module";
   const load = module._load;
   module._load = (name, ...rest) => { if (name === "koffi") throw new Error("no binary fits"); return load(name, ...rest); };`,
)}`;

test("it runs where the native module does not load, and says that this is why", async () => {
  const args = ["run", "--memory", "256M", "--workload", "fio:seconds=1,size=8M"];
  const { code, stderr } = await new Cli(args, [], { NODE_OPTIONS: WITHOUT_KOFFI }).ended;
  assert.equal(code, 0, stderr);
  assert.match(
    stderr,
    /^machine: embedded \(no VM\), because the native module koffi does not load.*no binary fits$/m,
  );
});

test("broken twin: a VM cannot do without the native module", async () => {
  const args = ["run", "--machine", "qemu", "--workload", "idle:seconds=1"];
  const ended = await new Cli(args, [], { NODE_OPTIONS: WITHOUT_KOFFI }).ended;
  assert.equal(ended.code, 1);
  assert.match(complaint(ended), /koffi does not load/);
});

test("auto: embedded where no VM can be had, with the reason in one line", async () => {
  const args = ["run", "--memory", "256M", "--workload", "idle:seconds=1"];
  const { code, stderr } = await new Cli(args, [], { PATH: "/nonexistent" }).ended;
  assert.equal(code, 0, stderr);
  assert.match(stderr, /^machine: embedded \(no VM\), because .*qemu-system-x86/m);
});

test("auto: embedded for a workload that only it has", async () => {
  const { code, stderr } = await new Cli(["run", "--memory", "256M", "--workload", "nic:seconds=1"]).ended;
  assert.equal(code, 0, stderr);
  assert.match(stderr, /^machine: embedded \(no VM\), because only there is a device for --workload nic/m);
});

for (const [args, sentence] of [
  [["--memory", "1T"], /--memory: this machine cannot reserve 1048576 MiB/],
  [["--disk", "/nonexistent/disk.img"], /disk\.img does not exist/],
  [["--workload", "gpu:buffers=64,size=64M"], /buffers need more than/],
] as const)
  test(`${args.join(" ")}: one sentence`, async () => {
    const ended = await new Cli([...EMBEDDED, ...args]).ended;
    assert.notEqual(ended.code, 0);
    assert.match(complaint(ended), sentence);
  });
