import assert from "node:assert/strict";
import { test } from "node:test";
import { demand, readCounters } from "../../src/control/guest-side.ts";
import type { Vm } from "../../src/control/vm.ts";
import type { GuestAgent } from "../../src/machine/qemu/agent.ts";
import { ensureGuest } from "../../src/machine/qemu/guest.ts";
import { descTableSize } from "../../src/wire/virtqueue.ts";
import { eventually } from "../support/eventually.ts";
import { type Twin, writeTwins } from "./broken-modules.ts";
import { bootedVm } from "./support.ts";
import { blockDevice } from "./user-qemu.ts";

/** The module's line for a fault of our disk: access, address, reason. */
const LOGGED = /DMA fault of 0000:00:04\.0: (read|write) of (0x[0-9a-f]+): (.+)$/gm;

/** What the guest's log has for each match of `lines`: its groups. */
const log = async (agent: GuestAgent, lines: RegExp): Promise<string[][]> =>
  [...(await demand(agent, "dmesg", "reading the log")).matchAll(lines)].map(([, ...groups]) => groups);

/** Wait until the module, the backend and the disk count alike; returns faults: met, reported, dropped. */
async function agreed({ qemu: { agent }, pins, disk }: Vm, metMin: number): Promise<number[]> {
  let seen: number[] = [];
  const agree = async () => {
    const { faults } = await readCounters(agent);
    const { faultsReported, faultsDropped } = pins;
    seen = [disk.faults, faultsReported, faultsDropped];
    return (
      disk.faults >= metMin && faults === faultsReported && faultsReported + faultsDropped === disk.faults
    );
  };
  assert.ok(await eventually(agree, 20_000), `met, reported, dropped: ${seen}`);
  return seen;
}

test("the guest's module logs and counts the DMA faults of its disk, which are all that the host has seen", async (t) => {
  const backendEntry = new URL("./broken-unpinner.ts", import.meta.url);
  const vm = await bootedVm(t, { backendEntry, policy: "off" });
  const { agent } = vm.qemu;
  assert.equal((await readCounters(agent)).faults, 0);
  // Not before: whoever loads a driver may wait for ever, too.
  await vm.operator.setPolicy("lru");
  // Whoever reads may wait for ever, because the disk faults on frames that are mapped.
  const script = "dd if=/dev/vda of=/dev/null bs=4k count=64 iflag=direct >/dev/null 2>&1 &";
  for (let tries = 0; vm.disk.faults === 0 && tries < 12; tries++) {
    await agent.run(script, { timeoutMs: 5000, what: "reading" }).catch(() => {});
    await eventually(() => vm.disk.faults > 0, 2000);
  }
  const counted = await agreed(vm, 1);
  t.diagnostic(`faults met, reported, dropped: ${counted}`);
  assert.ok(counted[1]! > 0);
  const logged = await log(agent, LOGGED);
  assert.ok(logged.length > 0);
  for (const [, , reason] of logged) assert.equal(reason, "not pinned, or unknown");
});

/** A size that nobody but these tests reads and writes: what the kernel does by itself is none of its faults. */
const SIZE = 3 * 512;
/** More requests than the event queue has buffers for, until the module looks again. */
const FLOOD = 1000;

/** A script that reads or writes the disk from its beginning on. `access`: what that makes the disk do to memory. */
const fio = (access: string, { blockSize = SIZE, requests = 1, more = "" } = {}) =>
  `cd /tmp && fio --name=faults --filename=/dev/vda --ioengine=libaio --direct=1 \\
--rw=${access === "write" ? "read" : "write"} --bs=${blockSize} --size=${blockSize * requests} ${more} 2>&1`;
/** Where a queue of 256 entries has what its device reads first: idx behind the descriptors and its own flags. */
const AVAIL_IDX = descTableSize(256) + 2;

const SOUND = fio("write", { blockSize: 4096, requests: 4 });

const TWINS: readonly Twin[] = [
  {
    what: "maps what the device is to write as only to be read, and the other way round; and tells",
    file: "remap_ops.c",
    sound: "\tret = map_at(domain, iova, page, pages, flags_of(dir));\n\tif (again(",
    broken: `
	if (TWIN && size == ${SIZE}) {
		dev_info_ratelimited(dev, "forbidden to %s 0x%llx\\n",
				     dir == DMA_FROM_DEVICE ? "write" : "read",
				     iova + offset_in_page(phys));
		dir = dir == DMA_FROM_DEVICE ? DMA_TO_DEVICE : DMA_FROM_DEVICE;
	}
	ret = map_at(domain, iova, page, pages, flags_of(dir));
	if (again(`,
  },
  {
    what: "tracks, and leaves its functions neither in bypass nor in a domain",
    file: "viommu.c",
    sound: "if (!set_bypass(vdev, 1)) {",
    broken: "if (!set_bypass(vdev, !TWIN)) {",
  },
  {
    what: "tells where it allocates rings, whichever it is",
    file: "dma_ops.c",
    sound: "\tif (track_alloc(hook, *addr, size, DMA_BIDIRECTIONAL)) {",
    broken: `
	dev_info(dev, "allocated 0x%llx\\n", *addr);
	if (track_alloc(hook, *addr, size, DMA_BIDIRECTIONAL)) {`,
  },
];

test("real faults of a guest's mistakes have their reason, address and access in its log", async (t) => {
  const guest = await ensureGuest((text) => t.diagnostic(text), writeTwins(t, TWINS));

  await t.test("MAPPING: in its domain, and not mapped for that access", async (t) => {
    const vm = await bootedVm(t, { guest, strategy: "viommu-strict", load: false });
    const { agent } = vm.qemu;
    const script = `set -e
modprobe coiommu remap=all twin=1; modprobe virtio_pci; modprobe virtio_blk
${blockDevice("vda")}
${SOUND}`;
    await demand(agent, script, "loading the drivers");
    assert.deepEqual(await agreed(vm, 0), [0, 0, 0]);

    const accesses = ["write", "read", "write", "write", "read"];
    for (const access of accesses) {
      const { code, output } = await agent.run(fio(access), { timeoutMs: 20_000, what: "one request" });
      assert.notEqual(code, 0, output);
    }
    assert.deepEqual(await agreed(vm, accesses.length), [accesses.length, accesses.length, 0]);
    const forbidden = await log(agent, /forbidden to (read|write) (0x[0-9a-f]+)$/gm);
    assert.deepEqual(
      forbidden.map(([access]) => access),
      accesses,
    );
    assert.deepEqual(
      await log(agent, LOGGED),
      forbidden.map((at) => [...at, "not mapped in its domain"]),
    );

    await agent.run(fio("write", { requests: FLOOD, more: "--continue_on_error=all" }), {
      timeoutMs: 60_000,
      what: "many requests",
    });
    const [met, reported, dropped] = await agreed(vm, accesses.length + FLOOD);
    t.diagnostic(`faults met, reported, dropped: ${met}, ${reported}, ${dropped}`);
    assert.equal(met, accesses.length + FLOOD);
    assert.ok(dropped! > 0 && reported! > accesses.length);
    await demand(agent, SOUND, "reading as ever");
  });

  await t.test("DOMAIN: neither in a domain nor in bypass", async (t) => {
    const vm = await bootedVm(t, { guest, load: false });
    const { agent } = vm.qemu;
    // In the background: its driver waits for ever for what the disk cannot read.
    const script = "(modprobe coiommu twin=2; modprobe virtio_pci; modprobe virtio_blk) >/dev/null 2>&1 &";
    await agent.run(script, { timeoutMs: 10_000, what: "loading the drivers" });
    assert.ok(await eventually(() => vm.disk.faults > 0));
    const [met, reported, dropped] = await agreed(vm, 1);
    t.diagnostic(`faults met, reported, dropped: ${met}, ${reported}, ${dropped}`);
    assert.deepEqual([reported, dropped], [met, 0]);
    const [ring, ...others] = await log(agent, /allocated (0x[0-9a-f]+)$/gm);
    assert.deepEqual(others, [], "the disk has one queue");
    const refused = `0x${(Number(ring) + AVAIL_IDX).toString(16)}`;
    const logged = await log(agent, LOGGED);
    assert.ok(logged.length >= met!);
    for (const fault of logged) assert.deepEqual(fault, ["read", refused, "not attached to a domain"]);
  });
});
