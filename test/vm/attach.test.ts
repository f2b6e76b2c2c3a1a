/** `coiommu attach` to a QEMU that a person has started, and what becomes of the VM when we leave. */
import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import net from "node:net";
import { join } from "node:path";
import { type TestContext, test } from "node:test";
import { demand, readCounters } from "../../src/control/guest-side.ts";
import { runFio } from "../../src/machine/qemu/fio.ts";
import { parseFioWorkload } from "../../src/machine/workload-text.ts";
import { ask, socketPath } from "../support/api.ts";
import { Cli, complaint, type Ended } from "../support/cli.ts";
import { eventually } from "../support/eventually.ts";
import { blockDevice, image, SHARED_RAM, scratch, startedQemu, userVm } from "./user-qemu.ts";

/** `coiommu attach`, which ends with the test. */
function attach(t: TestContext, qmp: string, ...more: string[]): Cli {
  const cli = new Cli(["attach", "--qmp", qmp, "--interval", "300ms", ...more]);
  t.after(() => cli.child.kill("SIGKILL"));
  return cli;
}

const NVME = ["-device", "nvme,drive=other,serial=x,addr=5"];
const LOAD = "modprobe virtio_pci; modprobe virtio_blk";

test("a VM on machine pc gets coIOMMU and a disk, loses them at Ctrl-C, and goes on", async (t) => {
  const vm = await userVm(t, "pc", ["-drive", "driver=null-co,if=none,id=other,size=64M", ...NVME]);
  const { agent, folder } = vm;
  const [disk, json] = [image(folder, "disk", 64), join(folder, "result.json")];
  await demand(agent, LOAD, "loading the drivers");
  const options = ["--assigned", "0000:00:05.0", "--disk", disk];
  const api = socketPath(t);
  const cli = attach(t, vm.qmp, ...options, "--json", json, "--api", api);
  await cli.said(`is the disk ${disk}`);
  await demand(agent, `modprobe coiommu; ${blockDevice("vda")}; ${blockDevice("nvme0n1")}`, "loading ours");
  const written = await runFio(
    agent,
    parseFioWorkload("fio:rw=randwrite,bs=4k,iodepth=8,seconds=2,size=16M"),
  );
  assert.deepEqual([written.verified, written.errors], [true, 0]);
  const before = await readCounters(agent);
  const read = (count: number) =>
    `dd if=/dev/nvme0n1 of=/dev/null bs=64k count=${count} iflag=direct 2>/dev/null`;
  await demand(agent, read(32), "reading what the VM had before");
  assert.ok((await readCounters(agent)).map! >= before.map! + 32, "its mappings are tracked");

  const get = async <T>(path: string) => (await ask(api, "GET", path)).body as T;
  const state = await get<{ life: string; endpoints: string[] }>("/v1/state");
  assert.deepEqual([state.life, state.endpoints.length, state.endpoints[1]], ["tracked", 2, "0000:00:05.0"]);
  const { devices } = await get<{ devices: { endpoint: string; bytes: number }[] }>("/v1/counters");
  assert.deepEqual(
    devices.map(({ endpoint }) => endpoint),
    [state.endpoints[0]],
    "only what is ours is counted",
  );
  assert.ok(devices[0]!.bytes >= 16 * 2 ** 20);
  const { body } = await ask(api, "PUT", "/v1/policy", { name: "off" });
  const { name, parameters } = body as { name: string; parameters: object };
  assert.deepEqual([name, parameters], ["off", {}]);
  const noBalloon = await ask(api, "PUT", "/v1/balloon", { memoryMiB: 64 });
  assert.equal(noBalloon.status, 409, JSON.stringify(noBalloon.body));

  cli.child.kill("SIGINT");
  const ended = await cli.ended;
  assert.equal(ended.code, 0, ended.stderr);
  assert.match(ended.stderr, /detached; the VM goes on\nuntil coiommu attaches again, 0000:00:05\.0/);
  const result = JSON.parse(readFileSync(json, "utf8"));
  assert.deepEqual(
    [result.schema, result.dma.faults, result.pins.refused, result.assigned, result.policy],
    ["coiommu.attach/1", 0, 0, ["0000:00:05.0"], "off"],
  );
  assert.ok(result.dma.bytes >= 16 * 2 ** 20 && result.pins.framesPeak > 0);
  await demand(agent, "[ ! -e /sys/bus/pci/devices/0000:00:04.0 ]", "looking for our function");

  const waiting = demand(agent, read(640), "reading without coIOMMU");
  const again = attach(t, vm.qmp, ...options);
  await waiting; // what was tracked goes on when coIOMMU is there again
  await again.said(`is the disk ${disk}`);
  await demand(
    agent,
    `${blockDevice("vda")}; dd if=/dev/vda of=/dev/null bs=64k count=32`,
    "reading the disk",
  );
  await vm.control.execute("quit").catch(() => {});
  const end = await again.ended;
  assert.deepEqual([end.code, /QEMU has ended\n$/.test(end.stderr)], [0, true], end.stderr);
});

test("a VM on machine q35 with root ports, whose coiommu is killed, can be attached to after a reset", async (t) => {
  const port = (n: number) => ["-device", `pcie-root-port,id=port${n},chassis=${n},slot=${n}`];
  const vm = await userVm(t, "q35", [...port(1), ...port(2)]);
  const { agent, control, folder } = vm;
  const disk = image(folder, "disk", 64);
  const cli = attach(t, vm.qmp, "--disk", disk);
  await cli.said(`is the disk ${disk}`);
  await demand(agent, `${LOAD}; modprobe coiommu; ${blockDevice("vda")}`, "loading the drivers");
  cli.child.kill("SIGKILL");
  await cli.ended;
  await demand(agent, "true", "asking the guest, which goes on");

  const refused = await attach(t, vm.qmp).ended;
  assert.match(complaint(refused), /QEMU has .*coiommu.* already.*device_del them, and reset the VM/);
  for (const id of ["coiommu-disk0", "coiommu"]) await control.execute("device_del", { id });
  await control.execute("set-action", { reboot: "reset" });
  await control.execute("system_reset");
  const loaded = () =>
    agent.run(`[ ! -e /sys/module/coiommu ] && ${LOAD}`, { timeoutMs: 2000, what: "asking" }).then(
      ({ code }) => code === 0,
      () => false,
    );
  let up = false;
  for (let tries = 0; !up && tries < 30; tries++) up = await loaded();
  assert.ok(up, "the guest has come up again");
  await attach(t, vm.qmp, "--disk", disk).said(`is the disk ${disk}`);
  await demand(agent, `modprobe coiommu; ${blockDevice("vda")}`, "loading ours");
  const { errors } = await runFio(agent, parseFioWorkload("fio:rw=randread,bs=4k,iodepth=8,seconds=1"));
  assert.equal(errors, 0);
});

test("a guest that does not let go is served on, until it is told a second time", async (t) => {
  const machine = ["-machine", "pc,memory-backend=ram", ...SHARED_RAM];
  const cli = attach(t, await startedQemu(t, scratch(t), ["-S", ...machine]));
  await cli.said("attached to QEMU");
  cli.child.kill("SIGINT");
  await cli.said("the guest has not let go of coiommu: still serving the VM");
  assert.equal(cli.child.exitCode, null);
  cli.child.kill("SIGINT");
  const ended = await cli.ended;
  assert.equal(ended.code, 1);
  assert.match(ended.stderr, /ended while the guest still has our functions.*reset the VM/);
});

/** What `attach` says to a QEMU with these arguments that does not run yet. */
async function refusal(t: TestContext, qemu: readonly string[], ...more: string[]): Promise<string> {
  const ended: Ended = await attach(t, await startedQemu(t, scratch(t), ["-S", ...qemu]), ...more).ended;
  assert.notEqual(ended.code, 0);
  return complaint(ended);
}

const SHARED = ["-machine", "pc,memory-backend=ram", ...SHARED_RAM];
const PRIVATE = ["-object", "memory-backend-memfd,id=ram,size=512M,share=off"];
for (const [what, qemu, more, sentence] of [
  ["private RAM", ["-machine", "pc,memory-backend=ram", ...PRIVATE], [], /"ram" .*share=off.* is not shared/],
  ["RAM of no backend", [], [], /share/],
  ["q35 without a port", ["-machine", "q35,memory-backend=ram", ...SHARED_RAM], [], /pcie-root-port,id=NAME/],
  ["an absent function", SHARED, ["--assigned", "0000:00:1e.0"], /no function 0000:00:1e\.0; it has 0000:00/],
  ["a tiny quota", SHARED, ["--quota", "0.01%"], /--quota: 13 frames are too few/],
  ["an absent image", SHARED, ["--disk", "/nonexistent/image"], /\/nonexistent\/image.*does not exist/],
] as const)
  test(`${what}: refused in a sentence`, async (t) => {
    assert.match(await refusal(t, qemu, ...more), sentence);
  });

test("what is no QMP socket of a QEMU that will do is named", async (t) => {
  const folder = scratch(t);
  const listening = async (name: string, greet: (socket: net.Socket) => void) => {
    const server = net.createServer(greet).listen(join(folder, name));
    t.after(() => server.close());
    await eventually(() => server.listening);
    return join(folder, name);
  };
  writeFileSync(join(folder, "file"), "");
  const newer = { QMP: { version: { qemu: { major: 10, minor: 0, micro: 2 } } } };
  const answers = (socket: net.Socket) => {
    socket.write(`${JSON.stringify(newer)}\n`);
    socket.on("data", (line) => {
      socket.write(`${JSON.stringify({ id: JSON.parse(line.toString()).id, return: {} })}\n`);
    });
  };
  const silent: net.Socket[] = [];
  for (const [path, sentence] of [
    [join(folder, "absent"), /absent does not exist: start QEMU with -qmp/],
    [join(folder, "file"), /file is no socket that anybody listens on/],
    [await listening("other", (socket) => socket.end("HTTP/1.1 400\r\n\r\n")), /other is not a QMP socket/],
    [await listening("silent", (socket) => silent.push(socket)), /silent says nothing as QEMU would/],
    [await listening("newer", answers), /QEMU 10\.0\.2; coIOMMU attaches to QEMU 7\.2/],
  ] as const) {
    const ended = await attach(t, path).ended;
    assert.equal(ended.code, 1);
    assert.match(complaint(ended), sentence);
  }
  for (const socket of silent) socket.destroy();
});
