import assert from "node:assert/strict";
import { once } from "node:events";
import test from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { Worker } from "node:worker_threads";
import { counters, countersBuffer } from "./counters.ts";
import { SharedWords } from "./shared-words.ts";

test("counters of one buffer are seen through every view, by name", () => {
  const names = ["pins", "faults"] as const;
  const buffer = countersBuffer(names);
  const writer = counters(names, buffer);
  writer.pins++;
  writer.faults = 2 ** 40;
  const reader = counters(names, buffer);
  assert.deepEqual({ ...reader }, { pins: 1, faults: 2 ** 40 });
  assert.deepEqual(Object.keys(reader), [...names]);
});

test("shared words: loads, stores and read-modify-writes that return the value before", () => {
  const buffer = new SharedArrayBuffer(16);
  const words = new SharedWords(buffer);
  const tail = new SharedWords(buffer, 8);
  assert.deepEqual([words.length, tail.length], [4, 2]);
  words.store(2, 5);
  assert.equal(tail.load(0), 5);
  assert.deepEqual([tail.add(0, 2), tail.or(0, 8), tail.and(0, ~1)], [5, 7, 15]);
  assert.equal(words.load(2), 14);
  assert.throws(() => words.load(4), RangeError);
});

test("wait does not wait for a word that has changed already", () => {
  const words = new SharedWords(new SharedArrayBuffer(4));
  words.wait(0, 1, 60_000);
  words.notify(0);
});

test("wait goes on when it is notified of nothing, until its word changes", {
  timeout: 30_000,
}, async (t) => {
  const buffer = new SharedArrayBuffer(4);
  const words = new SharedWords(buffer);
  const source = `
    import { workerData, parentPort } from "node:worker_threads";
    import { SharedWords } from ${JSON.stringify(import.meta.resolve("./shared-words.ts"))};
    const words = new SharedWords(workerData);
    words.wait(0, 0, 60_000);
    parentPort.postMessage(words.load(0));`;
  const worker = new Worker(new URL(`data:text/javascript,${encodeURIComponent(source)}`), {
    workerData: buffer,
  });
  t.after(() => worker.terminate());
  const woken = once(worker, "message");
  let over = false;
  void woken.finally(() => {
    over = true;
  });
  for (let n = 0; n < 3 && !over; n += Atomics.notify(new Int32Array(buffer), 0)) await sleep(10);
  words.store(0, 7);
  words.notify(0);
  assert.deepEqual(await woken, [7]);
});
