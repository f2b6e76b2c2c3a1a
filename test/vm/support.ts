import assert from "node:assert/strict";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import type { TestContext } from "node:test";
import { milliseconds } from "../../src/base/units.ts";
import { loadDrivers } from "../../src/control/guest-side.ts";
import { Vm, type VmOptions } from "../../src/control/vm.ts";
import { StatusField } from "../../src/host/process-status.ts";
import type { GuestAgent } from "../../src/machine/qemu/agent.ts";
import { ensureGuest, type Guest } from "../../src/machine/qemu/guest.ts";
import { LIVES } from "../../src/tracking/life.ts";
import { eventually } from "../support/eventually.ts";

const QEMU_CRASHED = /^QEMU was killed by SIGSEGV before the guest reached user space/;
export const INTERVAL_MS = 300;

/** Start a guest with our module and the disk's driver loaded, or without; it ends with the test. */
export async function bootedVm(
  t: TestContext,
  { load = true, ...overrides }: Partial<VmOptions> & { load?: boolean } = {},
): Promise<Vm> {
  const up = async () => {
    const vm = await startedVm(t, overrides);
    await vm.qemu.agent.hello(90_000);
    return vm;
  };
  const vm = await up().catch((error: Error) => {
    // QEMU 7.2 with TCG can crash in memory_region_dispatch_write() while firmware maps BARs: seen once in some 2,000 boots.
    if (!QEMU_CRASHED.test(error.message)) throw error;
    t.diagnostic(`once more, because ${error.message}`);
    return up();
  });
  const { strategy = "coiommu" } = overrides;
  if (load) await loadDrivers(vm.qemu.agent, overrides.guest ?? (await guestOf(t)), strategy, overrides);
  return vm;
}

const guestOf = (t: TestContext) => ensureGuest((text) => t.diagnostic(text));

/** What a test's VM is like unless it says otherwise. */
export const vmOptions = (guest: Guest): VmOptions => ({
  guest,
  memoryMiB: 512,
  cpus: 2,
  accel: "auto",
  strategy: "coiommu",
  policy: "lru",
  interval: milliseconds(INTERVAL_MS),
  quota: Number.POSITIVE_INFINITY,
  beforeActivation: "bios",
  activationTimeout: Number.POSITIVE_INFINITY,
  pinner: "io_uring",
  disk: { sizeMiB: 128 },
});

/** Power it on, no more. */
export async function startedVm(t: TestContext, overrides: Partial<VmOptions> = {}): Promise<Vm> {
  const vm = await Vm.start({ ...vmOptions(overrides.guest ?? (await guestOf(t))), ...overrides });
  t.after(() => vm.close());
  await vm.resume();
  return vm;
}

/** Wait for two whole unpin passes that begin after this call; throws where there are none. */
export async function twoPasses({ pins }: Pick<Vm, "pins">, timeoutMs = 30_000): Promise<void> {
  const before = pins.passes;
  const wanted = before + 3; // the third begins when the second has ended
  const happened = await eventually(() => pins.passes >= wanted, timeoutMs);
  const parked = `parked ${pins.parks} times by the guest, ${pins.parkedByOperator} by the operator`;
  const life = `the guest is ${LIVES[pins.life]}`;
  assert.ok(happened, `${pins.passes - before} unpin passes began in ${timeoutMs} ms: ${parked}; ${life}`);
}

/** Wait until a kernel without our module answers, after one with it. */
export async function comesUpAgain(agent: GuestAgent): Promise<void> {
  const asked = () =>
    agent.run("[ ! -e /sys/module/coiommu ]", { timeoutMs: 2000, what: "asking whether it is up again" });
  for (let tries = 0; tries < 40; tries++)
    if (
      await asked().then(
        ({ code }) => code === 0,
        () => false,
      )
    )
      return;
  assert.fail("the guest has not come up again");
}

/** Pages that the kernel counts as pinned by this process. */
export function pinnedPages(): number {
  const field = new StatusField("VmPin");
  try {
    return field.read() / 4;
  } finally {
    field.close();
  }
}

/** Descendants of a process whose command line holds `text`. */
export function childrenOf(pid: number, text: string): number[] {
  const read = (file: string) => {
    try {
      return readFileSync(file, "latin1");
    } catch {
      return ""; // it has ended
    }
  };
  const threads = existsSync(`/proc/${pid}/task`) ? readdirSync(`/proc/${pid}/task`) : [];
  const children = threads.flatMap((thread) =>
    read(`/proc/${pid}/task/${thread}/children`).split(" ").filter(Boolean).map(Number),
  );
  return children.flatMap((child) => [
    ...(read(`/proc/${child}/cmdline`).includes(text) ? [child] : []),
    ...childrenOf(child, text),
  ]);
}
