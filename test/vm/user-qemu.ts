/** A QEMU as a person starts it, for what attaches to it. */
import { spawn } from "node:child_process";
import { existsSync, mkdtempSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import net from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { TestContext } from "node:test";
import { GuestAgent } from "../../src/machine/qemu/agent.ts";
import { ensureGuest } from "../../src/machine/qemu/guest.ts";
import type { Qmp } from "../../src/machine/qemu/qmp.ts";
import { connectQmp } from "../../src/machine/qemu/qmp-socket.ts";
import { eventually } from "../support/eventually.ts";

export const SHARED_RAM = ["-object", "memory-backend-memfd,id=ram,size=512M,share=on"];

/** A folder that goes with the test. */
export function scratch(t: TestContext): string {
  const folder = mkdtempSync(join(tmpdir(), "coiommu-test-"));
  t.after(() => rmSync(folder, { recursive: true, force: true }));
  return folder;
}

export function image(folder: string, name: string, mib: number): string {
  const file = join(folder, name);
  writeFileSync(file, "");
  truncateSync(file, mib * 2 ** 20);
  return file;
}

/** Start QEMU with `args`; the path of its QMP socket. It ends with the test. */
export async function startedQemu(t: TestContext, folder: string, args: readonly string[]): Promise<string> {
  const qmp = join(folder, "qmp");
  const fixed = ["-display", "none", "-m", "512M", "-qmp", `unix:${qmp},server=on,wait=off`];
  const child = spawn("qemu-system-x86_64", [...fixed, ...args], { stdio: "ignore" });
  const exited = new Promise((resolve) => child.once("exit", resolve));
  t.after(async () => {
    child.kill("SIGKILL");
    await exited;
  });
  if (!(await eventually(() => existsSync(qmp)))) throw new Error("QEMU does not start");
  return qmp;
}

export interface UserVm {
  readonly folder: string;
  /** Path of the QMP socket to attach to. */
  readonly qmp: string;
  /** The person's own control connection. */
  readonly control: Qmp;
  readonly agent: GuestAgent;
}

/** A running guest, with the drivers of disks loaded, and without our module. */
export async function userVm(t: TestContext, machine: string, args: readonly string[] = []): Promise<UserVm> {
  const folder = scratch(t);
  const guest = await ensureGuest((text) => t.diagnostic(text));
  const [agentPath, controlPath] = [join(folder, "agent"), join(folder, "control")];
  const qmp = await startedQemu(t, folder, [
    ...["-machine", `${machine},memory-backend=ram`, ...SHARED_RAM, "-accel", "tcg", "-cpu", "max"],
    ...["-kernel", guest.kernel, "-initrd", guest.initrd],
    ...["-append", "console=ttyS0 quiet panic=-1 tsc=reliable mitigations=off no5lvl"],
    ...["-serial", "null", "-serial", `unix:${agentPath},server=on,wait=off`],
    ...["-qmp", `unix:${controlPath},server=on,wait=off`, ...args],
  ]);
  await eventually(() => existsSync(controlPath) && existsSync(agentPath));
  const stream = net.connect(agentPath);
  const { qmp: control } = await connectQmp(controlPath);
  t.after(() => {
    stream.destroy();
    control.close();
  });
  const agent = new GuestAgent(stream, () => "");
  await agent.hello(90_000);
  return { folder, qmp, control, agent };
}

/** Until there is a block device of this name in the guest. */
export const blockDevice = (name: string): string =>
  `i=0; while [ ! -b /dev/${name} ] && [ $i -lt 200 ]; do i=$((i+1)); usleep 50000; done; [ -b /dev/${name} ]`;
