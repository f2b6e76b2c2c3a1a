/**
 * An input that does not end cannot be told by the thread that runs it. A worker looks on: when an input has run for
 * too long, it writes the input to a file and ends the process.
 */
import { once } from "node:events";
import { writeFileSync } from "node:fs";
import { isMainThread, parentPort, Worker, workerData } from "node:worker_threads";
import type { Target } from "./fuzzer.ts";

/** Words before the input's bytes: how many inputs have begun or ended, and the length of the one that runs. */
const TURN = 0;
const LENGTH = 1;
const HEAD = 8;
const INPUT_MAX = 1 << 16;

interface Watched {
  readonly shared: SharedArrayBuffer;
  readonly file: string;
  readonly seconds: number;
}

/** `target`, looked after until close(). Its inputs may run for `seconds`. */
export async function watched(target: Target, seconds = 20): Promise<Target & { close(): void }> {
  const shared = new SharedArrayBuffer(HEAD + INPUT_MAX);
  const words = new Int32Array(shared, 0, 2);
  const bytes = new Uint8Array(shared, HEAD);
  const data: Watched = { shared, file: `finding-${target.name}-endless.bin`, seconds };
  const worker = new Worker(new URL(import.meta.url), { workerData: data, execArgv: [] });
  await once(worker, "message"); // a thread that is busy starts no other
  worker.unref();
  const turn = () => {
    Atomics.add(words, TURN, 1);
    Atomics.notify(words, TURN);
  };
  return {
    ...target,
    run(input) {
      bytes.set(input.subarray(0, INPUT_MAX));
      words[LENGTH] = input.length;
      turn();
      try {
        target.run(input);
      } finally {
        turn();
      }
    },
    close: () => void worker.terminate(),
  };
}

function watch({ shared, file, seconds }: Watched): void {
  const words = new Int32Array(shared, 0, 2);
  for (;;) {
    const turn = Atomics.load(words, TURN);
    // Odd: an input runs.
    const outcome = Atomics.wait(words, TURN, turn, 1000 * seconds);
    if (outcome !== "timed-out" || turn % 2 === 0) continue;
    writeFileSync(file, new Uint8Array(shared, HEAD, words[LENGTH]).slice());
    writeFileSync(2, `An input runs for more than ${seconds} s: ${file}\n`);
    process.kill(process.pid, "SIGKILL");
  }
}

if (!isMainThread) {
  parentPort!.postMessage("ready");
  watch(workerData as Watched);
}
