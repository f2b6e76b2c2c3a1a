/** A real guest in a real QEMU, without any device of ours: boot, commands, fio, and every way it may end. */
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import {
  existsSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Duplex } from "node:stream";
import { after, before, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { UserError } from "../../src/base/errors.ts";
import { runFio } from "../../src/machine/qemu/fio.ts";
import { ensureGuest, type Guest } from "../../src/machine/qemu/guest.ts";
import { type Qemu, startQemu } from "../../src/machine/qemu/qemu.ts";
import { parseFioWorkload } from "../../src/machine/workload-text.ts";

const BOOT_MS = 60_000;
const quick = { timeoutMs: 20_000, what: "a command" };

let guest: Guest;
let folder: string;
let qemu: Qemu;

async function boot(): Promise<Qemu> {
  const disk = join(folder, "disk");
  writeFileSync(disk, "");
  truncateSync(disk, 64 * 2 ** 20);
  const drive = ["-blockdev", `file,node-name=d0,filename=${disk}`, "-device", "virtio-blk-pci,drive=d0"];
  const devices = [{ fds: [], arguments: () => drive }];
  const started = await startQemu({ ...guest, memoryMiB: 512, cpus: 1, accel: "auto", devices });
  await started.resume();
  return started;
}

const isRunning = (pid: number): boolean =>
  existsSync(`/proc/${pid}`) && !/^State:\s+Z/m.test(readFileSync(`/proc/${pid}/status`, "utf8"));

before(async () => {
  folder = mkdtempSync(join(tmpdir(), "coiommu-boot-"));
  guest = await ensureGuest((text) => console.log(text));
  qemu = await boot();
  assert.equal(await qemu.agent.hello(BOOT_MS), guest.kernelVersion);
});

after(async () => {
  await qemu?.close();
  rmSync(folder, { recursive: true });
});

test("commands: output, exit code, several at once", async () => {
  const slow = qemu.agent.run("sleep 1; echo slow; exit 7", quick);
  const large = qemu.agent.run("seq 20000", quick);
  assert.deepEqual(await qemu.agent.run("echo fast; echo error >&2", quick), {
    code: 0,
    output: "fast\nerror\n",
  });
  assert.equal((await large).output.split("\n").length, 20_001);
  assert.deepEqual(await slow, { code: 7, output: "slow\n" });
});

test("regression: a command whose line is still arriving when another one ends is not lost", async () => {
  const other = qemu.agent.run("sleep 0.1", quick);
  const halved = writingInHalves(400, () => qemu.agent.run("echo whole", quick));
  await other;
  assert.equal((await halved).output, "whole\n");
});

/** What `act` writes to any socket reaches it in two parts, `ms` apart: less than the agent's nudge. */
function writingInHalves<T>(ms: number, act: () => T): T {
  const inherited: (text: string) => boolean = Duplex.prototype.write;
  Socket.prototype.write = function (this: Socket, text: string) {
    void sleep(ms).then(() => inherited.call(this, text.slice(8)));
    return inherited.call(this, text.slice(0, 8));
  } as typeof Socket.prototype.write;
  try {
    return act();
  } finally {
    delete (Socket.prototype as Partial<Socket>).write;
  }
}

test("what a workload needs is there: clock, modules, disk", async () => {
  const script =
    "cat /sys/devices/system/clocksource/clocksource0/current_clocksource; lsmod | grep -c virtio";
  assert.equal(
    (await qemu.agent.run(script, quick)).output,
    qemu.accel === "tcg" ? "tsc\n0\n" : "kvm-clock\n0\n",
  );
  const modprobe = `modprobe virtio_pci && modprobe virtio_blk && modinfo ${guest.moduleName} >/dev/null && ls /dev/vda`;
  assert.deepEqual(await qemu.agent.run(modprobe, quick), { code: 0, output: "/dev/vda\n" });
});

test("fio reads; fio writes and checks what it wrote", async () => {
  const read = await runFio(qemu.agent, parseFioWorkload("fio:rw=randread,seconds=1"));
  assert.ok(read.iops > 0 && read.latencyUs.p50 > 0 && read.latencyUs.p99 >= read.latencyUs.p50);
  assert.deepEqual([read.verified, read.errors], [null, 0]);
  const written = await runFio(qemu.agent, parseFioWorkload("fio:rw=randwrite,seconds=1,size=16M"));
  assert.deepEqual([written.verified, written.errors], [true, 0]);
});

test("a command that hangs is named, and others go on", async () => {
  const hang = qemu.agent.run("sleep 1000", { timeoutMs: 500, what: "the endless command" });
  await assert.rejects(hang, /the endless command did not end in the guest within 0.5 s/);
  assert.equal((await qemu.agent.run("echo on", quick)).output, "on\n");
});

test("QEMU killed in the middle of a command: a clear error, and nothing left", async () => {
  const running = qemu.agent.run("sleep 1000", quick);
  process.kill(qemu.pid, "SIGKILL");
  await assert.rejects(
    running,
    (error) => error instanceof UserError && /killed by SIGKILL during a command/.test(error.message),
  );
  assert.equal((await qemu.exited).signal, "SIGKILL");
  await qemu.close();
  await qemu.close();
  assert.ok(!isRunning(qemu.pid));
  assert.deepEqual(readdirSync(folder), ["disk"]);
});

test("a guest that panics ends QEMU", async () => {
  qemu = await boot();
  await qemu.agent.hello(BOOT_MS);
  await assert.rejects(
    qemu.agent.run("echo c >/proc/sysrq-trigger", quick),
    /QEMU ended with code 0.*last console line/,
  );
  await qemu.close();
});

test("QEMU does not outlive this process, not even one that is killed", async () => {
  const script = `
    import { startQemu } from ${JSON.stringify(import.meta.resolve("../../src/machine/qemu/qemu.ts"))};
    const qemu = await startQemu(${JSON.stringify({ ...guest, memoryMiB: 64, cpus: 1, accel: "tcg" })});
    console.log(qemu.pid);`;
  const parent = spawn(process.execPath, ["--input-type=module", "-e", script], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  const pid = Number(
    await new Promise((resolve) => parent.stdout.once("data", (chunk) => resolve(chunk.toString()))),
  );
  assert.ok(isRunning(pid));
  parent.kill("SIGKILL");
  for (let i = 0; i < 50 && isRunning(pid); i++) await sleep(100);
  assert.ok(!isRunning(pid));
});

test("QEMU that does not start says why", async () => {
  const devices = [{ fds: [], arguments: () => ["-device", "no-such-device"] }];
  const start = startQemu({ ...guest, memoryMiB: 64, cpus: 1, accel: "tcg", devices });
  await assert.rejects(start, /QEMU did not start: .*no-such-device/);
});
