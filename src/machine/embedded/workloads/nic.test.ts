import assert from "node:assert/strict";
import { test } from "node:test";
import { EarlyUnmap } from "../../../../test/support/dma.ts";
import { flipping } from "../../../../test/support/flip.ts";
import { type NicRigOptions, nicParts } from "../../../../test/support/nic.ts";
import { guestOf, runWorkload } from "../../../../test/support/workload.ts";
import { GENERATOR } from "../../../device/nic.ts";
import type { NicPort } from "../../../driver/nic.ts";
import { RECEIVE_MODES } from "../../../driver/receive-buffers.ts";
import type { GuestAccess } from "../../../memory/guest-memory.ts";
import { COMMAND_EOP, ReceiveDescriptor, TransmitDescriptor } from "../../../wire/nic.ts";
import { parseNicWorkload } from "../../workload-text.ts";
import { NicWorkload } from "./nic.ts";
import { report } from "./workload.ts";

interface Options extends Partial<NicRigOptions> {
  readonly failEvery?: number;
  readonly seed?: number;
  readonly port?: (nic: NicPort) => NicPort;
  readonly turn?: (n: number) => void;
}

function run(text: string, { failEvery, seed, turn, port = (nic) => nic, ...options }: Options = {}) {
  const r = nicParts(options);
  const parsed = { ...parseNicWorkload(text), seconds: 1 };
  const loopback = parsed.traffic === "loopback";
  const workload = new NicWorkload({
    ...{ guest: guestOf(r, seed, 1), port: port(r.nic), workload: parsed, ringSize: 32, cacheFrames: 512 },
    sender: loopback ? 6 : GENERATOR,
  });
  r.nic.start({
    receive: workload.receiver.ring,
    transmit: workload.transmitter.ring,
    bufferSize: workload.buffers.size,
    source: loopback ? "loopback" : { length: parsed.size },
  });
  r.dma.failEvery = failEvery ?? r.dma.failEvery;
  runWorkload(workload, r.nic, turn);
  return { ...r, ...workload.measurement, report: report([workload.measurement]) };
}

for (const mode of RECEIVE_MODES)
  for (const traffic of ["receive", "loopback"])
    for (const size of [60, 1500, 9000])
      test(`nic:mode=${mode},traffic=${traffic},size=${size}: all arrive whole, and nothing stays mapped`, () => {
        const r = run(`nic:mode=${mode},traffic=${traffic},size=${size}`);
        assert.deepEqual([r.mismatches, r.errors, r.counters.faults, r.counters.errors], [0, 0, 0, 0]);
        assert.ok(r.ops > 100, `${r.ops} packets`);
        assert.equal(r.bytes, r.ops * size);
        assert.deepEqual([r.dma.live, r.pages.used, r.report.verified], [0, 0, true]);
        assert.equal(r.report.latencyUs !== null, traffic === "loopback");
      });

test("the same seed makes the same mappings, another makes others", () => {
  const [a, b, c] = [1, 1, 2].map((seed) => run("nic:traffic=loopback", { seed }));
  assert.deepEqual([a!.ops, a!.dma.attempts, a!.dma.mapped], [b!.ops, b!.dma.attempts, b!.dma.mapped]);
  assert.notDeepEqual(a!.dma.mapped, c!.dma.mapped);
});

for (const mode of RECEIVE_MODES)
  test(`${mode}: one mapping of seven fails: nothing is lost`, () => {
    const r = run(`nic:mode=${mode},traffic=loopback`, { failEvery: 7 });
    assert.deepEqual([r.mismatches, r.errors, r.counters.faults, r.dma.live], [0, 0, 0, 0]);
    assert.ok(r.mapFailures > 10 && r.ops > 50);
  });

test("broken twin: one bit of a packet is noticed", () => {
  for (const traffic of ["receive", "loopback"]) {
    const r = run(`nic:mode=fresh,traffic=${traffic}`, { access: flipping(50) });
    assert.equal(r.mismatches, Math.floor(r.compared / 50));
    assert.deepEqual([r.report.verified, r.dma.live], [false, 0]);
  }
});

test("broken twin: a driver that unmaps too early has errors, and no packet", () => {
  for (const traffic of ["receive", "loopback"]) {
    const r = run(`nic:mode=half,traffic=${traffic}`, { Dma: EarlyUnmap });
    assert.ok(r.counters.faults > 0 && r.errors > 0);
    assert.deepEqual([r.ops, r.mismatches, r.report.verified], [0, 0, null]);
  }
});

/** A device whose every 40th packet goes where the one before went. */
const misplacing = (sound: GuestAccess): GuestAccess => {
  let count = 0;
  let before = 0;
  return {
    read: (gpa, into) => sound.read(gpa, into),
    load16: (gpa) => sound.load16(gpa),
    store16: (gpa, value) => sound.store16(gpa, value),
    transfer: (...args) => sound.transfer(...args),
    write: (gpa, from) => {
      if (from.length > ReceiveDescriptor.size) {
        const target = ++count % 40 === 0 ? before : gpa;
        before = gpa;
        sound.write(target, from);
      } else sound.write(gpa, from);
    },
  };
};
test("broken twin: packets in the wrong buffer are noticed", () => {
  for (const traffic of ["receive", "loopback"])
    assert.equal(run(`nic:traffic=${traffic}`, { access: misplacing }).report.verified, false);
});

/** A device that takes the 20th packet for an empty one, and says that it was sent. */
const forgetting = (sound: GuestAccess): GuestAccess => {
  let packets = 0;
  return {
    load16: (gpa) => sound.load16(gpa),
    store16: (gpa, value) => sound.store16(gpa, value),
    transfer: (...args) => sound.transfer(...args),
    write: (gpa, from) => sound.write(gpa, from),
    read: (gpa, into) => {
      sound.read(gpa, into);
      if (into.length !== TransmitDescriptor.size) return;
      const { length, command } = TransmitDescriptor.read(into);
      if (length === 0) return; // a receive descriptor
      if (packets === 19) TransmitDescriptor.write(into, { length: 0 });
      if (command & COMMAND_EOP) packets++;
    },
  };
};
test("broken twin: one packet that disappears is noticed", () => {
  const r = run("nic:traffic=loopback", { access: forgetting });
  assert.deepEqual([r.mismatches, r.errors, r.report.verified, r.dma.live], [1, 0, false, 0]);
});

test("a device that does not stop is waited for", () => {
  let stopped = false;
  let asked = 0;
  const r = run("nic:mode=fresh", {
    port: (nic) => ({
      receive: (tail) => nic.receive(tail),
      transmit: (tail) => nic.transmit(tail),
      stop: () => {
        asked++;
        nic.stop();
      },
      get stopped() {
        return stopped;
      },
    }),
    turn: (n) => {
      if (asked > 0 && n % 100 === 0) stopped = true;
    },
  });
  assert.deepEqual([asked, r.mismatches, r.dma.live], [1, 0, 0]);
});
