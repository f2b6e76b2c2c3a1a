/** What a person sees when something goes wrong: one sentence, the right exit code, nothing left behind. */
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { before, type TestContext, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { ensureGuest } from "../../src/machine/qemu/guest.ts";
import { Cli, complaint } from "../support/cli.ts";
import { eventually } from "../support/eventually.ts";
import { fieldDifferences } from "../support/result-fields.ts";
import { childrenOf } from "./support.ts";

/** QEMU's process, while it runs. */
async function qemuOf(cli: Cli): Promise<number> {
  const find = () => childrenOf(cli.pid, "qemu-system")[0];
  assert.ok(await eventually(() => find() !== undefined), "QEMU does not run");
  return find()!;
}

const alive = (pid: number): boolean => {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
};

function scratch(t: TestContext, first: (path: string) => void = () => {}): string {
  const directory = mkdtempSync(join(tmpdir(), "coiommu-test-"));
  t.after(() => {
    first(directory);
    rmSync(directory, { recursive: true, force: true });
  });
  return directory;
}

const IDLE = ["run", "--machine", "qemu", "--memory", "256M", "--workload", "idle:seconds=60"];

before(() => ensureGuest(() => {}));

test("killing QEMU ends the run with one sentence", async () => {
  const cli = new Cli(IDLE);
  await cli.said("running idle");
  process.kill(await qemuOf(cli), "SIGKILL");
  const ended = await cli.ended;
  assert.equal(ended.code, 1);
  assert.match(complaint(ended), /QEMU was killed by SIGKILL/);
});

test("a guest that dies ends the run with one sentence", async (t) => {
  const script = join(scratch(t), "panic.sh");
  writeFileSync(script, "echo c >/proc/sysrq-trigger; sleep 60");
  const cli = new Cli(["run", "--machine", "qemu", "--memory", "256M", "--workload", `script:${script}`]);
  const ended = await cli.ended;
  assert.equal(ended.code, 1);
  assert.match(complaint(ended), /QEMU ended/);
});

for (const [signal, code] of [
  ["SIGINT", 130],
  ["SIGTERM", 143],
] as const)
  test(`${signal} ends the guest in order`, async () => {
    const cli = new Cli(IDLE);
    await cli.said("booting");
    const qemu = await qemuOf(cli);
    cli.child.kill(signal);
    const ended = await cli.ended;
    assert.equal(ended.code, code);
    assert.match(complaint(ended), new RegExp(`${signal}: ending the guest`));
    assert.ok(!alive(qemu), "QEMU is left behind");
  });

test("QEMU does not outlive a coiommu that is killed", async () => {
  const cli = new Cli(IDLE);
  await cli.said("booting");
  const qemu = await qemuOf(cli);
  cli.child.kill("SIGKILL");
  await cli.ended;
  assert.ok(await eventually(() => !alive(qemu), 5000), "QEMU is left behind");
});

test("a disk image that is missing is named, and nothing is started", async (t) => {
  const image = join(scratch(t), "absent.img");
  const ended = await new Cli([...IDLE, "--disk", image]).ended;
  assert.notEqual(ended.code, 0);
  assert.match(complaint(ended), new RegExp(`${image}.*does not exist`));
});

test("a full disk is an I/O error in the guest and a sentence here", async (t) => {
  const directory = scratch(t, (path) => execFileSync("umount", [path]));
  execFileSync("mount", ["-t", "tmpfs", "-o", "size=4m", "tmpfs", directory]);
  const image = join(directory, "disk.img");
  writeFileSync(image, "");
  truncateSync(image, 64 * 2 ** 20);
  const fio = "fio:rw=randwrite,bs=4k,iodepth=4,seconds=1,size=32M";
  const ended = await new Cli([
    "run",
    "--machine",
    "qemu",
    "--memory",
    "256M",
    "--disk",
    image,
    "--workload",
    fio,
  ]).ended;
  assert.equal(ended.code, 1);
  assert.match(complaint(ended), /disk image.*ENOSPC/);
});

/** Without CAP_IPC_LOCK, and with a memlock limit. */
const limited = (bytes: number) => [
  ...["prlimit", `--memlock=${bytes}:${bytes}`],
  ...["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"],
];

for (const strategy of ["static", "coiommu"])
  test(`a memlock limit that is too small for ${strategy} is named with the remedy`, async () => {
    const ended = await new Cli([...IDLE, "--strategy", strategy], limited(64 * 1024)).ended;
    assert.equal(ended.code, 1);
    assert.match(
      complaint(ended),
      /memlock limit of this process is 64 KiB; raise it \(`ulimit -l \d+`, or LimitMEMLOCK=\d+K/,
    );
  });

test("pins refused for want of memlock hold the guest's I/O back, and lose nothing once they can be had", async (t) => {
  const json = join(scratch(t), "result.json");
  const enough = 6 * 2 ** 20;
  const fio = "fio:rw=randwrite,bs=64k,iodepth=8,seconds=2,size=16M";
  const cli = new Cli(
    ["run", "--machine", "qemu", "--memory", "256M", "--workload", fio, "--json", json],
    limited(enough),
  );
  const limit = (bytes: number) => execFileSync("prlimit", ["--pid", String(cli.pid), `--memlock=${bytes}:`]);
  await cli.said("running fio");
  limit(64 * 1024);
  await sleep(8000);
  assert.equal(cli.child.exitCode, null, "the run goes on");
  limit(enough);
  const ended = await cli.ended;
  assert.equal(ended.code, 0, ended.stderr);
  const { default: result } = await import(json, { with: { type: "json" } });
  assert.deepEqual(fieldDifferences(result), []);
  assert.ok(result.pins.refused > 0, "some pins were refused");
  assert.deepEqual([result.workload.verified, result.workload.errors, result.dma.faults], [true, 0, 0]);
  assert.equal(result.maps.liveAtEnd, 0);
});
