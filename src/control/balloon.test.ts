import assert from "node:assert/strict";
import test from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { UserError } from "../base/errors.ts";
import type { QmpEvent } from "../machine/qemu/qmp.ts";
import { Balloon } from "./balloon.ts";

const MIB = 2 ** 20;

/** QEMU with a balloon whose guest does at once what it is told, and a backend; what they are asked, in order. */
function setUp(stayed: number[] = []) {
  const log: string[] = [];
  let actual = 512 * MIB;
  let hear: (event: QmpEvent) => void = () => {};
  const qmp = {
    execute: async <T>(command: string, args?: Record<string, unknown>): Promise<T> => {
      if (command === "balloon") {
        log.push(`balloon ${(args!.value as number) / MIB}`);
        actual = args!.value as number;
      }
      return { actual } as T;
    },
    onEvent: (listener: typeof hear) => {
      hear = listener;
      return () => {};
    },
  };
  let refusal: UserError | undefined;
  const operator = {
    unpinIdle: async (range: { discarded?: boolean }) => {
      assert.equal(range.discarded, true);
      if (refusal) throw refusal;
      log.push("sweep");
      await sleep(1);
      return { unpinned: 3, stayed: stayed.shift() ?? 0, stayedRanges: [] };
    },
  };
  return {
    log,
    balloon: new Balloon(qmp, operator),
    changed: () => hear({ event: "BALLOON_CHANGE", data: { actual } }),
    refuse: () => {
      refusal = new UserError("unpinning is parked", 1);
    },
  };
}

test("what is in the balloon is unpinned before the guest is told of a new size, and when it has it", async () => {
  const { balloon, log } = setUp();
  assert.deepEqual(await balloon.resize(256), { memoryMiB: 256, unpinned: 6, stayed: 0 });
  assert.deepEqual(await balloon.resize(512), { memoryMiB: 512, unpinned: 6, stayed: 0 });
  assert.deepEqual(log, ["sweep", "balloon 256", "sweep", "sweep", "balloon 512", "sweep"]);
});

test("a guest gets nothing back while a frame of it stays pinned", async () => {
  const soon = setUp([5, 5]);
  await soon.balloon.resize(1024);
  assert.deepEqual(soon.log, ["sweep", "sweep", "sweep", "balloon 1024", "sweep"]);
  const never = setUp(Array(100).fill(5));
  await assert.rejects(never.balloon.resize(1024), /cannot have its memory back: 5 frames/);
  assert.ok(never.log.every((what) => what === "sweep"));
  // To give more away does no harm.
  const { memoryMiB, stayed } = await never.balloon.resize(256);
  assert.deepEqual([memoryMiB, stayed], [256, 5]);
});

test("two at once are served one after the other, and a refusal is the first one's alone", async () => {
  const { balloon, log } = setUp(Array(20).fill(1));
  const both = await Promise.allSettled([balloon.resize(1024), balloon.resize(256)]);
  assert.deepEqual(
    both.map(({ status }) => status),
    ["rejected", "fulfilled"],
  );
  assert.deepEqual(log.slice(-3), ["sweep", "balloon 256", "sweep"]);
});

test("a change by somebody else is swept up; where that is refused, so is a resize", async () => {
  const { balloon, changed, log, refuse } = setUp();
  changed();
  assert.deepEqual(log, ["sweep"]);
  refuse();
  changed();
  await assert.rejects(balloon.resize(256), /parked/);
  assert.deepEqual(log, ["sweep"]);
});
