import assert from "node:assert/strict";
import test from "node:test";
import { Worker } from "node:worker_threads";
import { Bell } from "./bell.ts";
import { SharedWords } from "./shared-words.ts";

/** A thread that takes one piece of work per ring, as long as there is any; `look` is how it sleeps. */
async function workDone(pieces: number, look: string): Promise<boolean> {
  const bell = Bell.buffer();
  const work = new SharedArrayBuffer(8);
  const source = `
    import { parentPort, workerData } from "node:worker_threads";
    import { Bell } from ${JSON.stringify(import.meta.resolve("./bell.ts"))};
    import { SharedWords } from ${JSON.stringify(import.meta.resolve("./shared-words.ts"))};
    const bell = new Bell(workerData.bell);
    const words = new SharedWords(workerData.work);
    parentPort.postMessage("ready");
    while (words.load(1) < ${pieces}) { ${look} }`;
  const worker = new Worker(new URL(`data:text/javascript,${encodeURIComponent(source)}`), {
    workerData: { bell, work },
  });
  await new Promise((resolve) => worker.once("message", resolve));
  const words = new SharedWords(work);
  const ringer = new Bell(bell);
  // One piece at a time, so that a ring that is lost is never made good by the next.
  for (let piece = 1; piece <= pieces; piece++) {
    words.add(0, 1);
    ringer.ring();
    const until = performance.now() + 2000;
    while (words.load(1) < piece && performance.now() < until);
    if (words.load(1) < piece) break;
  }
  await worker.terminate();
  return words.load(1) === pieces;
}

const WORK = "if (words.load(0) > words.load(1)) words.add(1, 1);";

test("a ring between looking for work and sleeping is not lost", async () => {
  assert.ok(await workDone(5000, `const { rings } = bell; ${WORK} bell.sleep(rings, 60_000);`));
});

test("broken twin: who reads the rings after looking sleeps through one", async () => {
  const slow = "for (let until = performance.now() + 5; performance.now() < until; );";
  assert.ok(!(await workDone(50, `${WORK} ${slow} const { rings } = bell; bell.sleep(rings, 60_000);`)));
});
