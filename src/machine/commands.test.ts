import assert from "node:assert/strict";
import test from "node:test";
import { Bell } from "../memory/bell.ts";
import { WorkerEnded, type WorkerEvent, WorkerHost } from "./commands.ts";

/** A worker that sleeps on a bell, with these handlers, as source text. */
function worker(handlers: string) {
  const buffer = Bell.buffer();
  const bell = new Bell(buffer);
  const source = `
    import { workerData } from "node:worker_threads";
    import { Bell } from ${JSON.stringify(import.meta.resolve("../memory/bell.ts"))};
    import { CommandServer } from ${JSON.stringify(import.meta.resolve("./commands.ts"))};
    import { HostError, UserError } from ${JSON.stringify(import.meta.resolve("../base/errors.ts"))};
    let stopping = false;
    const bell = new Bell(workerData.buffer);
    const commands = new CommandServer(workerData, { stop: () => { stopping = true; return "bye"; }, ${handlers} });
    while (!stopping) {
      const { rings } = bell;
      commands.serve();
      if (!stopping) bell.sleep(rings, Infinity);
    }`;
  const events: WorkerEvent[] = [];
  let closed = 0;
  const host = new WorkerHost({
    name: "the worker",
    entry: new URL(`data:text/javascript,${encodeURIComponent(source)}`),
    data: { buffer },
    wake: { signal: () => bell.ring(), close: () => closed++ },
    onEvent: (event) => events.push(event),
  });
  return { host, events, closed: () => closed };
}

test("commands are answered in order, with their arguments, until it is stopped", async () => {
  const { host, closed } = worker("double: (n) => 2 * n");
  const answers = await Promise.all([1, 2, 3].map((n) => host.request<number>("double", n)));
  assert.deepEqual(answers, [2, 4, 6]);
  assert.equal(await host.stop(), "bye");
  assert.deepEqual([await host.ended, closed()], [undefined, 1]);
  await assert.rejects(host.request("double", 4), WorkerEnded);
});

test("an error of ours is the command's rejection, and the worker goes on", async () => {
  const { host } = worker(
    'fail: () => { throw new HostError("pin", "ENOMEM", "1 page"); }, no: () => { throw new UserError("no", 1); }, ok: () => 1',
  );
  const failure = { code: "ERR_COIOMMU_HOST", errno: "ENOMEM", message: "pin: ENOMEM (1 page)" };
  await assert.rejects(host.request("fail"), failure);
  await assert.rejects(host.request("no"), { code: "ERR_COIOMMU_USER", message: "no" });
  assert.equal(await host.request("ok"), 1);
  await host.stop();
});

test("what it tells without being asked arrives, also last words", async () => {
  const { host, events } = worker(
    'warn: () => commands.tell("warning", "smoke"), die: () => { commands.tell("broken", "fire"); process.exit(1); }',
  );
  await host.request("warn");
  await assert.rejects(host.request("die"));
  await host.ended;
  assert.deepEqual(events, [
    { kind: "warning", message: "smoke" },
    { kind: "broken", message: "fire" },
  ]);
});

test("a bug rejects what waits with one line, and says where", async () => {
  const { host } = worker("crash: () => { undefined.x; }, never: () => {}");
  const first = host.request("crash");
  const second = host.request("never");
  await assert.rejects(
    first,
    /^WorkerEnded: the worker has ended: internal error, please report it: [^\n]*$/,
  );
  await assert.rejects(second, { code: "ERR_COIOMMU_USER" });
  assert.match(String(await host.ended), /internal error/);
});

test("a worker that leaves without being told to has ended with an error", async () => {
  const { host } = worker("leave: () => process.exit(0)");
  await assert.rejects(host.request("leave"), { message: "the worker has ended" });
  assert.ok(await host.ended);
});

test("terminate ends it wherever it is: asleep, or busy for ever", async () => {
  const asleep = worker("");
  await asleep.host.terminate();
  assert.equal(await asleep.host.ended, undefined);
  const busy = worker("spin: () => { for (;;); }");
  busy.host.request("spin").catch(() => {});
  await busy.host.terminate();
  assert.equal(await busy.host.ended, undefined);
});
