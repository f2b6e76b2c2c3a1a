import assert from "node:assert/strict";
import test from "node:test";
import { random } from "../../test/support/random.ts";
import { BAR, FEATURES, NEEDS_RESET, plugged, running, VERSION_1 } from "../../test/support/virtio-pci.ts";

// --- configuration space ------------------------------------------------------------------------------------------------

test("the function is a modern virtio device: VIRTIO 1.2 section 4.1.2", () => {
  const { pci } = plugged();
  assert.equal(pci.configRead(0, 4), 0x1057_1af4);
  assert.ok(pci.configRead(0x08, 1) >= 1, "revision");
  assert.equal(pci.configRead(0x0e, 1), 0, "header type");
  assert.equal(pci.configRead(0x3d, 1), 1, "interrupt pin");
});

test("a walk of the capability list finds the four structures in BAR 0, disjoint", () => {
  const { pci, device } = plugged();
  assert.ok(pci.configRead(0x06, 2) & 0x10, "the status says that there is a list");
  const found = new Map<number, { offset: number; length: number }>();
  const visited: number[] = [];
  for (let at = pci.configRead(0x34, 1); at !== 0; at = pci.configRead(at + 1, 1)) {
    assert.ok(at >= 0x40 && at % 4 === 0 && !visited.includes(at), `capability at ${at}`);
    visited.push(at);
    assert.equal(pci.configRead(at, 1), 0x09, "vendor specific");
    assert.equal(pci.configRead(at + 4, 1), 0, "BAR");
    const type = pci.configRead(at + 3, 1);
    assert.ok(!found.has(type));
    found.set(type, { offset: pci.configRead(at + 8, 4), length: pci.configRead(at + 12, 4) });
    assert.equal(pci.configRead(at + 2, 1), type === 2 ? 20 : 16, "cap_len");
    if (type === 2) assert.equal(pci.configRead(at + 16, 4), 4, "notify_off_multiplier");
  }
  assert.deepEqual([...found.keys()].sort(), [1, 2, 3, 4]);
  assert.equal(found.get(1)!.length, 56);
  assert.ok(found.get(2)!.length >= 4 * device.queueSizes.length);
  assert.equal(found.get(4)!.length, device.configSize);
  const extents = [...found.values()].sort((a, b) => a.offset - b.offset);
  for (const [i, { offset, length }] of extents.entries())
    assert.ok(offset + length <= (extents[i + 1]?.offset ?? 0x4000));
});

test("BAR 0 is sized by all ones: 16 KiB of 32-bit memory; the others are absent", () => {
  const { pci } = plugged();
  pci.configWrite(0x10, 4, 0xffff_ffff);
  assert.equal(pci.configRead(0x10, 4), 0xffff_c000);
  pci.configWrite(0x10, 4, BAR | 0xfff);
  assert.equal(pci.configRead(0x10, 4), BAR, "the low bits are fixed");
  for (const at of [0x14, 0x18, 0x1c, 0x20, 0x24, 0x30]) {
    pci.configWrite(at, 4, 0xffff_ffff);
    assert.equal(pci.configRead(at, 4), 0, `BAR at ${at}`);
  }
});

test("all but the command register, BAR 0 and the interrupt line is read-only", () => {
  const { pci } = plugged();
  const before = Array.from({ length: 64 }, (_, i) => pci.configRead(4 * i, 4));
  for (let i = 0; i < 64; i++) pci.configWrite(4 * i, 4, 0xffff_ffff);
  const changed = before.flatMap((value, i) => (pci.configRead(4 * i, 4) === value ? [] : [4 * i]));
  assert.deepEqual(changed, [0x04, 0x10, 0x3c]);
  assert.deepEqual([pci.configRead(4, 2), pci.configRead(6, 2)], [0x0407, 0x0010]);
  assert.deepEqual([pci.configRead(0x3c, 1), pci.configRead(0x3d, 1)], [0xff, 1]);
});

test("bytes and words of the configuration space are written in place", () => {
  const { pci } = plugged();
  pci.configWrite(0x04, 1, 0x02);
  pci.configWrite(0x05, 1, 0x04);
  assert.equal(pci.configRead(0x04, 2), 0x0402);
  pci.configWrite(0x12, 2, 0x1234);
  assert.equal(pci.configRead(0x10, 4), 0x1234_0000);
});

// --- features and status ------------------------------------------------------------------------------------------------

test("both halves of the offered features are read; beyond them there are none", () => {
  const { read, write } = plugged();
  const halves = [0, 1, 2, 0xffff_ffff].map((select) => {
    write("deviceFeatureSelect", select);
    return read("deviceFeature");
  });
  assert.deepEqual(halves, [7n, 0x8000_0001n, 0n, 0n]);
});

for (const [what, features, ok] of [
  ["VERSION_1 alone", VERSION_1, true],
  ["all that is offered", FEATURES, true],
  ["no VERSION_1", 1n, false],
  ["a feature that is not offered", VERSION_1 | 8n, false],
  ["a feature of the high half that is not offered", VERSION_1 | (1n << 33n), false],
  ["features that the device does not accept together", VERSION_1 | 2n, false],
  ["nothing", 0n, false],
] as const)
  test(`FEATURES_OK is ${ok ? "kept" : "refused"} for a driver that takes ${what}`, () => {
    const { negotiate, device } = plugged();
    assert.equal(negotiate(features), ok ? 11 : 3);
    assert.deepEqual(device.log, ["reset", ...(ok ? [`start ${features.toString(16)}`] : [])]);
  });

test("a driver may offer fewer features after FEATURES_OK was refused", () => {
  const { negotiate, write, status } = plugged();
  assert.equal(negotiate(VERSION_1 | 2n), 3);
  write("driverFeatureSelect", 0);
  write("driverFeature", 3);
  write("deviceStatus", 11);
  assert.equal(status(), 11);
});

test("features are settled by FEATURES_OK: later writes change nothing", () => {
  const { negotiate, write, read } = plugged();
  negotiate(VERSION_1);
  write("driverFeatureSelect", 0);
  write("driverFeature", 7);
  assert.equal(read("driverFeature"), 0n);
});

test("a third half of driver features is ignored", () => {
  const { write, negotiate } = plugged();
  assert.equal(negotiate(VERSION_1), 11);
  write("deviceStatus", 0);
  write("driverFeatureSelect", 2);
  write("driverFeature", 0xffff_ffff);
  assert.equal(negotiate(VERSION_1), 11);
});

for (const status of [4, 7])
  test(`DRIVER_OK without FEATURES_OK (status ${status}) does not start the device`, () => {
    const rig = plugged();
    const queue = rig.enableQueue(0, 0x1000);
    rig.write("deviceStatus", status);
    assert.equal(rig.status(), status & ~4);
    queue.add([{ gpa: 0x8000 as never, length: 1 }], []);
    rig.notify(0);
    assert.deepEqual(rig.device.log, []);
  });

test("status 0 resets: features, queues and the device; the configuration space stays", () => {
  const { write, read, device, pci } = running();
  write("deviceStatus", 0);
  assert.equal(device.log.at(-1), "reset");
  for (const name of ["deviceStatus", "queueEnable", "queueDesc", "queueDriver", "driverFeature"] as const)
    assert.equal(read(name), 0n, name);
  assert.equal(read("queueSize"), 64n);
  assert.equal(pci.configRead(0x10, 4), BAR);
});

test("a machine reset also clears the BAR and the command register, and is told to the device", () => {
  const { pci, device } = running();
  pci.reset();
  const seen = [pci.configRead(0x10, 4), pci.configRead(4, 2), ...device.log.slice(-2)];
  assert.deepEqual(seen, [0, 0, "reset", "machine reset"]);
});

// --- queues ---------------------------------------------------------------------------------------------------------------

test("each queue has its size and notify offset; one that does not exist has size 0", () => {
  const { read, write } = plugged();
  assert.equal(read("numQueues"), 2n);
  const seen = [0, 1, 2, 0xffff].map((index) => {
    write("queueSelect", index);
    return [read("queueSize"), read("queueNotifyOff"), read("queueEnable")];
  });
  assert.deepEqual(seen, [
    [64n, 0n, 0n],
    [16n, 1n, 0n],
    [0n, 0n, 0n],
    [0n, 0n, 0n],
  ]);
});

test("64-bit registers are written in halves of 32 bits, or as a whole", () => {
  const { write, write64, read } = plugged();
  write64("queueDesc", 0x12_3456_7890);
  write("queueDevice", 0xfedc_ba98_7654_3210n);
  assert.deepEqual([read("queueDesc"), read("queueDevice")], [0x12_3456_7890n, 0xfedc_ba98_7654_3210n]);
});

test("there is no interrupt vector to set", () => {
  const { write, read } = plugged();
  write("configMsixVector", 1);
  write("queueMsixVector", 1);
  assert.deepEqual([read("configMsixVector"), read("queueMsixVector")], [0xffffn, 0xffffn]);
});

test("a chain is served when its queue is notified, at its own offset", () => {
  const { queue, notify, device } = running();
  const head = queue.add([{ gpa: 0x8000 as never, length: 5 }], []);
  notify(1);
  assert.equal(queue.poll(), undefined);
  notify(0);
  assert.deepEqual(queue.poll(), { head, written: 1 });
  assert.deepEqual(device.log.slice(-1), ["kick 0"]);
});

test("a queue size above the one offered is not taken", () => {
  const { write, read } = plugged();
  write("queueSize", 128);
  assert.equal(read("queueSize"), 64n);
});

test("the registers of an enabled queue do not change any more", () => {
  const { write, read } = running();
  const before = read("queueDesc");
  write("queueDesc", 0x7777_0000n);
  write("queueSize", 2);
  assert.deepEqual([read("queueDesc"), read("queueSize"), read("queueEnable")], [before, 8n, 1n]);
});

test("notifications before DRIVER_OK, and of queues that are not there, do nothing", () => {
  const rig = plugged();
  rig.negotiate(VERSION_1);
  rig.enableQueue(0, 0x1000);
  rig.notify(0);
  rig.write("deviceStatus", 15);
  for (const index of [1, 2, 500, 1023]) rig.notify(index);
  assert.deepEqual(
    rig.device.log.filter((l) => l.startsWith("kick")),
    [],
  );
});

test("the device may use a queue of its own accord from DRIVER_OK to reset, and only one that was set up", () => {
  const rig = plugged();
  const seen: boolean[] = [];
  const look = () => rig.pci.withQueue(1, (queue) => seen.push(queue !== undefined));
  rig.negotiate(VERSION_1);
  const queue = rig.enableQueue(1, 0x1000);
  look();
  rig.write("deviceStatus", 15);
  look();
  rig.pci.withQueue(0, (other) => seen.push(other !== undefined));
  queue.add([], [{ gpa: 0x8000 as never, length: 24 }]);
  rig.pci.withQueue(1, (events) => events!.push(events!.pop()!.head, 24));
  assert.deepEqual([seen, queue.poll()?.written], [[false, true, false], 24]);
  rig.write("deviceStatus", 0);
  look();
  assert.equal(seen.at(-1), false);
});

test("what the driver spoils of such a queue makes the device need a reset, and it has no queue from then on", () => {
  const rig = running();
  rig.queue.offer(99);
  rig.pci.withQueue(0, (queue) => void queue!.pop());
  assert.deepEqual([rig.status(), rig.pci.peerErrors], [15 | NEEDS_RESET, 1]);
  rig.pci.withQueue(0, (queue) => assert.equal(queue, undefined));
});

const breaks: Record<string, (rig: ReturnType<typeof running>) => void> = {
  "a head out of range": ({ queue, notify }) => {
    queue.offer(99);
    notify(0);
  },
  "a chain that the device cannot recover from": ({ queue, notify }) => {
    queue.add([{ gpa: 0x8000 as never, length: 666 }], []);
    notify(0);
  },
  "a ring outside RAM": ({ write64, write, notify }) => {
    write("queueSelect", 1);
    write64("queueDesc", 2 ** 40);
    write64("queueDriver", 2 ** 40 + 4096);
    write64("queueDevice", 2 ** 40 + 8192);
    write("queueEnable", 1);
    notify(1);
  },
  "a queue that is not aligned": ({ write }) => {
    write("queueSelect", 1);
    write("queueDesc", 8n);
    write("queueEnable", 1);
  },
  "a queue of 12 descriptors": ({ write }) => {
    write("queueSelect", 1);
    write("queueSize", 12);
    write("queueEnable", 1);
  },
};
for (const [what, breakIt] of Object.entries(breaks))
  test(`after ${what} the device needs a reset, serves nothing, and works again after one`, () => {
    const rig = running();
    breakIt(rig);
    assert.equal(rig.status(), 15 | NEEDS_RESET);
    assert.equal(rig.pci.peerErrors, 1);
    const before = rig.device.log.length;
    rig.notify(0);
    rig.write("deviceStatus", 15);
    assert.equal(rig.status(), 15 | NEEDS_RESET, "the driver cannot clear it");
    assert.equal(rig.device.log.length, before);

    assert.equal(rig.negotiate(VERSION_1), 11);
    rig.memory.write(0x1000, new Uint8Array(0x3000));
    const queue = rig.enableQueue(0, 0x1000);
    rig.write("deviceStatus", 15);
    queue.add([{ gpa: 0x8000 as never, length: 1 }], []);
    rig.notify(0);
    assert.equal(queue.poll()?.written, 1);
  });

test("a bug of the device is not taken for the driver's fault", () => {
  const { queue, notify } = running();
  queue.add([{ gpa: 0x8000 as never, length: 667 }], []);
  assert.throws(() => notify(0), RangeError);
});

// --- accesses -------------------------------------------------------------------------------------------------------------

test("the device configuration is read and written at its offset, and not beyond its end", () => {
  const { pci, device } = plugged();
  assert.equal(pci.barRead(BAR + 0x2000 + 4, 4), 0xa7a6_a5a4n);
  pci.barWrite(BAR + 0x2000 + 8, 4, 0x0403_0201n);
  assert.equal(pci.barRead(BAR + 0x2000 + 10, 4), 0n);
  pci.barWrite(BAR + 0x2000 + 10, 4, 0xffff_ffffn);
  assert.deepEqual([...device.config.subarray(8)], [1, 2, 3, 4]);
});

test("addresses are absolute while the BAR is mapped, and 0-based while it is not", () => {
  const { pci } = plugged();
  pci.configWrite(0x10, 4, 0);
  assert.equal(pci.barRead(18, 2), 2n);
  pci.configWrite(0x10, 4, BAR);
  assert.equal(pci.barRead(BAR + 18, 2), 2n);
});

test("accesses at hostile offsets, of every size, never throw and leave the driver's state as it is", () => {
  const offsets = [
    53,
    54,
    55,
    56,
    57,
    0xfff,
    0x1000,
    0x1fff,
    0x2000 + 11,
    0x2000 + 12,
    0x2fff,
    0x3ffc,
    0x3fff,
  ];
  const addresses = [
    ...offsets.map((o) => BAR + o),
    ...[BAR - 1, BAR + 0x4000, BAR + 0x4000 - 1, 2 ** 32 - 1, 2 ** 52, 2 ** 64],
  ];
  const { pci, status } = running();
  for (const address of addresses)
    for (const size of [1, 2, 4, 8]) {
      const value = pci.barRead(address, size);
      assert.ok(value >= 0n && value < 1n << BigInt(8 * size), `${size} bytes at ${address}`);
      pci.barWrite(address, size, (1n << BigInt(8 * size)) - 1n);
    }
  for (const offset of [253, 254, 255, 256, 4092, 4095])
    for (const size of [1, 2, 4]) {
      pci.configWrite(offset, size, 0xffff_ffff);
      assert.ok(pci.configRead(offset, size) >= 0);
    }
  assert.equal(status(), 15);
});

test("50,000 random accesses never throw", () => {
  const next = random(3);
  const { pci } = plugged();
  for (let i = 0; i < 50_000; i++) {
    const size = [1, 2, 4, 8][next(4)]!;
    const address = BAR + next(64) + [0, 0, 0x1000, 0x2000, 0x3000, 0x3fe0][next(6)]!;
    const value = (BigInt(next(2 ** 32)) << 32n) | BigInt([0, 1, 3, 11, 15, 255, next(2 ** 32)][next(7)]!);
    if (next(4) === 0) pci.barRead(address, size);
    else pci.barWrite(address, size, value & ((1n << BigInt(8 * size)) - 1n));
  }
});
