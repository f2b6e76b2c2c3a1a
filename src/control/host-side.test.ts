import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import test from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { ramRegion } from "../../test/support/guest.ts";
import { RAM_FRAMES } from "../../test/support/machine.ts";
import { type Bdf, FRAME_SIZE, type Gfn, type Gpa, milliseconds } from "../base/units.ts";
import { DRIVER_COUNTERS } from "../driver/counters.ts";
import { DirectDma } from "../driver/dma.ts";
import { DmaMapFailed } from "../driver/dma-api.ts";
import { FramePool } from "../driver/pages.ts";
import { GuestDriver } from "../driver/viommu.ts";
import { IoUringPinner } from "../host/io-uring-pinner.ts";
import { counters, countersBuffer } from "../memory/counters.ts";
import { createIommuBuffer, DeviceGate } from "../tracking/software-iommu.ts";
import { TRACKING_COUNTERS } from "../tracking/tracker.ts";
import { VIRTIO_IOMMU_S_NOENT } from "../wire/virtio-iommu.ts";
import { claimsOf } from "./claims.ts";
import { HostSide, type HostSideData } from "./host-side.ts";
import type { PinnerName } from "./pinners.ts";
import type { Strategy } from "./strategy.ts";

const FIRST = 0x20 as Bdf;
const SECOND = 0x28 as Bdf;
const DOMAIN = 3;
const GATE = 2;

const hostSide = (
  iommu: SharedArrayBuffer,
  shared: SharedArrayBuffer,
  pinner: PinnerName,
  warn: (text: string) => void,
  overrides: Partial<HostSideData> = {},
) =>
  new HostSide(
    {
      ...{ iommu, counters: shared, assigned: [], frontEnd: "virtio-iommu", qemu: false },
      ...{ strategy: "coiommu", beforeActivation: "none", activationTimeout: Number.POSITIVE_INFINITY },
      ...{ pinner, policy: "lru", interval: milliseconds(1000), quota: Number.POSITIVE_INFINITY },
      recordingSince: null,
      speculate: "off",
      ...overrides,
    },
    (_, text) => warn(text),
  );

/** A guest whose driver is active, without an assigned function. */
function guest() {
  const iommu = createIommuBuffer(RAM_FRAMES);
  const shared = countersBuffer(TRACKING_COUNTERS);
  const host = hostSide(iommu, shared, "software", (text) => assert.fail(text));
  host.setMemory([ramRegion(0, RAM_FRAMES)]);
  const on = {
    ...{ memory: host.memory, pciFunction: host.function },
    counters: counters(DRIVER_COUNTERS, countersBuffer(DRIVER_COUNTERS)),
    cpu: { waitFor: (done: () => boolean) => done() },
  };
  const pages = new FramePool(host.memory, 1024 as Gfn, 512);
  const driver = GuestDriver.activate(on, pages, 1);
  return {
    host,
    driver,
    pages,
    pins: counters(TRACKING_COUNTERS, shared),
    iommuTable: iommu,
    gate: new DeviceGate(iommu, GATE, () => host.serveDevices()),
  };
}

test("a guest that cannot start because of its quota is refused with one sentence, and no warning before it", () => {
  const words = [createIommuBuffer(RAM_FRAMES), countersBuffer(TRACKING_COUNTERS)] as const;
  const all = { beforeActivation: "all", quota: RAM_FRAMES / 2 } as const;
  const host = hostSide(...words, "software", (text) => assert.fail(text), all);
  host.setMemory([ramRegion(0, RAM_FRAMES)]);
  for (let slices = 0; slices < 4; slices++) host.work();
  assert.throws(() => host.started(), /--quota cannot be below/);
});

test("memory that cannot be mapped a second time: a warning says that its pages are pinned one by one", () => {
  const warnings: string[] = [];
  const words = [createIommuBuffer(RAM_FRAMES), countersBuffer(TRACKING_COUNTERS)] as const;
  const host = hostSide(...words, "io_uring", (text) => warnings.push(text));
  for (let i = 0; i < 2; i++) assert.equal(host.present!.of(4096, 4096), undefined);
  assert.deepEqual(warnings, ["each page is pinned for itself: mremap: EFAULT (4096 bytes)"]);
  host.stop(() => {});
});

// In CI a missing real part fails.
const skip = process.env.CI ? false : (IoUringPinner.unavailable() ?? false);

/** A backend without CAP_IPC_LOCK, and with memlock limits in KiB, has 4 MiB of RAM: what it tells until it starts, and then. */
function toldOfMemlock(soft: number, hard: number, overrides: Partial<HostSideData>, then = ""): unknown {
  const load = (path: string) => `await import(${JSON.stringify(import.meta.resolve(path))})`;
  const child = `
    const { HostSide } = ${load("./host-side.ts")};
    const { SharedMapping } = ${load("../host/mapping.ts")};
    const { memlockLimit } = ${load("../host/limits.ts")};
    const { createIommuBuffer } = ${load("../tracking/software-iommu.ts")};
    const { countersBuffer } = ${load("../memory/counters.ts")};
    const { TRACKING_COUNTERS } = ${load("../tracking/tracker.ts")};
    const told = [];
    const host = new HostSide(
      { iommu: createIommuBuffer(1024), counters: countersBuffer(TRACKING_COUNTERS),
        assigned: [], frontEnd: "virtio-iommu", qemu: false, strategy: "coiommu", beforeActivation: "none",
        activationTimeout: Infinity, pinner: "io_uring", policy: "lru", interval: 1e9, speculate: "off",
        recordingSince: null, ...${JSON.stringify(overrides)}, quota: ${overrides.quota ?? "Infinity"} },
      (_, text) => told.push(text),
    );
    const ram = new SharedMapping(4096 * 1024);
    host.setMemory([{ gpa: 0, size: ram.size, hostAddress: ram.address, bytes: SharedMapping.bytes(ram) }]);
    try { for (let slices = 0; slices < 100; slices++) { host.work(); host.started(); } }
    catch (error) { told.push(error.message); }
    ${then}
    console.log(JSON.stringify([memlockLimit() / 1024, ...told]));
    host.stop(() => {});`;
  const root = process.getuid?.() === 0;
  const command = [
    ...(root
      ? ["setpriv", "--bounding-set=-ipc_lock,-sys_resource", "--inh-caps=-ipc_lock,-sys_resource"]
      : []),
    ...["prlimit", `--memlock=${soft * 1024}:${hard * 1024}`],
    ...[process.execPath, "--input-type=module", "-e", child],
  ];
  const run = spawnSync(command[0]!, command.slice(1), { encoding: "utf8", cwd: "/" });
  assert.equal(run.status, 0, run.stderr);
  return JSON.parse(run.stdout);
}

test("the memlock limit is raised to what there may be when all RAM is pinned, and nobody is told", {
  skip,
}, () => {
  assert.deepEqual(toldOfMemlock(64, 8000, {}), [8000]);
  assert.deepEqual(toldOfMemlock(64, 2048, { quota: 256 }), [2048], "a quota of 1 MiB needs no more");
});

test("a hard limit below that is raised to, and told once, with the number that would do", { skip }, () => {
  const remedy = (kib: number) =>
    `raise it (\`ulimit -l ${kib}\`, or LimitMEMLOCK=${kib}K of the service), or run as root`;
  const warning = (kib: number) =>
    `pins beyond the memlock limit of this process, 4096 KiB, will be refused: ${remedy(kib)}`;
  assert.deepEqual(toldOfMemlock(64, 4096, {}), [4096, warning(5120)]);
  const more = "host.commands.setQuota(800);";
  assert.deepEqual(toldOfMemlock(64, 4096, { quota: 256 }, more), [4096, warning(4224)]);
  const less = "host.commands.setQuota(700);";
  assert.deepEqual(toldOfMemlock(64, 4096, { quota: 256 }, less), [4096]);
});

test("pins that must stand before the guest starts and do not: one sentence, with the number", {
  skip,
}, () => {
  const remedy = "raise it (`ulimit -l 5120`, or LimitMEMLOCK=5120K of the service), or run as root";
  assert.deepEqual(toldOfMemlock(64, 2048, { strategy: "static" }), [
    2048,
    `the host cannot pin guest memory: the memlock limit of this process is 2048 KiB; ${remedy}`,
  ]);
});

const noEntry = (error: unknown) => error instanceof DmaMapFailed && error.status === VIRTIO_IOMMU_S_NOENT;

test("a plugged function can be attached to a domain, by the number that it has in the IOMMU; one that is gone leaves it", () => {
  const { host, driver, gate } = guest();
  const { domains } = driver;
  assert.throws(() => domains.attach(DOMAIN, FIRST), noEntry);
  host.assign({ bdf: FIRST, gate: GATE });
  domains.attach(DOMAIN, FIRST);
  domains.map(DOMAIN, 100, 5, 1, 3);
  assert.equal(gate.translate(100, "write"), 5);
  host.unassign(FIRST);
  assert.equal(gate.translate(100, "write"), -1);
  assert.throws(() => domains.map(DOMAIN, 101, 6, 1, 3), noEntry, "its domain has ceased to exist");
  assert.throws(() => domains.attach(DOMAIN, FIRST), noEntry);

  host.assign({ bdf: SECOND, gate: GATE });
  domains.attach(DOMAIN, SECOND);
  domains.map(DOMAIN, 100, 7, 1, 3);
  assert.equal(gate.translate(100, "write"), 7);
});

test("frozen: the pins stay while QEMU's own function is there, and go when it has been unplugged", async () => {
  const { host, driver, pages, pins } = guest();
  host.assign({ bdf: FIRST });
  driver.dma(FIRST, new DirectDma(pages)).mapSingle((5 * FRAME_SIZE) as Gpa, FRAME_SIZE, "from-device");
  driver.deactivate();
  const looked = async () => {
    await sleep(60); // it looks every 50 ms
    host.work();
    return pins.framesNow;
  };
  assert.equal(await looked(), 1, "its device may still write");
  host.assign({ bdf: FIRST, absent: true });
  assert.equal(await looked(), 0);
});

/** Unpin what a tracked function has left idle, when the thread of another has ended inside a DMA window. */
function unpinnedAfterDeath(told: boolean): number {
  const { host, driver, pages, gate } = guest();
  host.assign({ bdf: FIRST, gate: GATE });
  host.assign({ bdf: SECOND, gate: GATE + 1 });
  const dma = driver.dma(FIRST, new DirectDma(pages));
  const address = dma.mapSingle((5 * FRAME_SIZE) as Gpa, FRAME_SIZE, "from-device");
  gate.enter();
  if (told) host.deviceEnded(GATE);
  dma.unmapSingle(address, FRAME_SIZE, "from-device");
  return host.commands.unpinIdle({ first: 5, end: 6, from: 0 }).unpinned;
}

test("a device whose thread dies inside a DMA window keeps nothing of the others pinned", () => {
  assert.equal(unpinnedAfterDeath(true), 1);
});

test("that check fails when nobody closes the window", () => {
  assert.equal(unpinnedAfterDeath(false), 0);
});

test("what is never transferred is told until a function is assigned whose DMA goes by another IOMMU, and not any more then", () => {
  const { gate, ...machine } = guest();
  const { host, driver } = machine;
  host.assign({ bdf: FIRST, gate: GATE });
  driver.domains.attach(DOMAIN, FIRST);
  driver.domains.map(DOMAIN, 100, 5, 2, 3);
  const told = (strategy: Strategy = "coiommu") => Object.values(claimsOf(machine, { strategy }));
  assert.deepEqual(told(), [2, 2]);
  gate.translate(100, "write");
  assert.deepEqual(
    [told(), told("static"), told("none")],
    [
      [2, 1],
      [null, null],
      [null, null],
    ],
  );
  host.assign({ bdf: SECOND });
  assert.deepEqual(told(), [2, null]);
  host.unassign(SECOND);
  assert.deepEqual(told(), [2, null], "what it had used is pinned still");
});
