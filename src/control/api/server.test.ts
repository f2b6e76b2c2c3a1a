import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { existsSync, statSync, writeFileSync } from "node:fs";
import net from "node:net";
import test, { type TestContext } from "node:test";
import { ask, socketPath } from "../../../test/support/api.ts";
import { HostError } from "../../base/errors.ts";
import { milliseconds, parseBdf } from "../../base/units.ts";
import { WorkerEnded, type WorkerHost } from "../../machine/commands.ts";
import { counters, countersBuffer } from "../../memory/counters.ts";
import { createIommuBuffer } from "../../tracking/software-iommu.ts";
import { TRACKING_COUNTERS } from "../../tracking/tracker.ts";
import type { Machine, MachineOptions } from "../machine.ts";
import { Operator } from "../operator.ts";
import { ApiServer } from "./server.ts";

/** Serves a guest whose backend does as `request` says. */
async function serving(t: TestContext, request: WorkerHost["request"], strategy = "coiommu" as const) {
  const path = socketPath(t);
  const warnings: string[] = [];
  const api = await ApiServer.listen(path, (text) => warnings.push(text));
  t.after(() => api.close());
  const options = { strategy, policy: "lru", interval: milliseconds(1000) } as MachineOptions;
  const machine = {
    ...{ name: "embedded", assigned: [], disks: null, drivers: null, started: { kernelSource: "none" } },
    pins: counters(TRACKING_COUNTERS, countersBuffer(TRACKING_COUNTERS)),
    iommuTable: createIommuBuffer(64),
    operator: new Operator({ request } as WorkerHost, options),
  };
  api.guest = { machine: machine as unknown as Machine, options };
  return { api, path, warnings, machine };
}

for (const [what, thrown, status, error] of [
  [
    "a backend that is gone",
    new WorkerEnded("the backend has ended", 1),
    503,
    { code: "unavailable", message: "the backend has ended", field: null, errno: null },
  ],
  [
    "a host that fails",
    new HostError("mlock", "ENOMEM"),
    500,
    { code: "host", message: "mlock: ENOMEM", field: null, errno: "ENOMEM" },
  ],
  [
    "a bug",
    new TypeError("x is undefined"),
    500,
    { code: "internal", message: "internal error, please report it", field: null, errno: null },
  ],
] as const)
  test(`${what}: ${status}, and the API goes on`, async (t) => {
    const { path, warnings } = await serving(t, () => Promise.reject(thrown));
    const { status: got, body } = await ask(path, "POST", "/v1/park", { parked: true });
    assert.deepEqual([got, body], [status, { error }]);
    assert.equal(warnings.length, what === "a bug" ? 1 : 0);
    assert.equal((await ask(path, "GET", "/v1/state")).status, 200);
  });

test("a machine that takes no devices while it runs refuses to be given one, and to have one taken away", async (t) => {
  const { path } = await serving(t, () => Promise.reject(new Error("not asked")));
  for (const [route, body] of [
    ["/v1/plug", { file: "disk" }],
    ["/v1/unplug", { id: "coiommu-disk0" }],
  ] as const)
    assert.equal((await ask(path, "POST", route, body)).status, 409);
  assert.equal((await ask(path, "POST", "/v1/plug", { file: "" })).status, 400);
});

test("a disk is plugged as its body says: fault-capable if asked for", async (t) => {
  const { path, machine } = await serving(t, () => Promise.reject(new Error("not asked")));
  const opened: unknown[] = [];
  const disks = {
    open: (disk: unknown) => opened.push(disk),
    plug: () => "coiommu-disk0",
    bdfOf: () => parseBdf("01:00.0"),
  };
  Object.assign(machine, { disks });
  const plug = (body: unknown) => ask(path, "POST", "/v1/plug", body);
  const { status, body } = await plug({ file: "a", faultCapable: true });
  assert.deepEqual([status, body], [200, { id: "coiommu-disk0", endpoint: "0000:01:00.0" }]);
  await plug({ file: "b" });
  const wrong = await plug({ file: "c", faultCapable: "yes" });
  assert.deepEqual(
    [wrong.status, (wrong.body as { error: { field: string } }).error.field],
    [400, "faultCapable"],
  );
  assert.deepEqual(opened, [
    { sizeMiB: 0, file: "a", faultCapable: true },
    { sizeMiB: 0, file: "b" },
  ]);
});

test("without a live guest: 503, but wrong requests are told so and the document is there", async (t) => {
  const { api, path } = await serving(t, () => Promise.reject(new Error("not asked")));
  api.guest = undefined;
  const status = async (...args: [string, string, unknown?]) => (await ask(path, ...args)).status;
  assert.deepEqual(
    [
      await status("GET", "/v1/state"),
      await status("PUT", "/v1/quota", { quotaFrames: 1 }),
      await status("PUT", "/v1/quota", {}),
      await status("GET", "/openapi.json"),
    ],
    [503, 503, 400, 200],
  );
});

test("an unpin goes on slice by slice, and ends when its client hangs up", async (t) => {
  const froms: number[] = [];
  let asked = Promise.withResolvers<void>();
  let slice = Promise.withResolvers<unknown>();
  const { path } = await serving(t, <T>(command: string, argument: unknown) => {
    assert.equal(command, "unpinIdle");
    froms.push((argument as { from: number }).from);
    asked.resolve();
    return slice.promise as Promise<T>;
  });
  const answer = ask(path, "POST", "/v1/unpin", { firstFrame: 7, frames: 3 });
  for (const next of [256, null]) {
    await asked.promise;
    asked = Promise.withResolvers();
    const { resolve } = slice;
    slice = Promise.withResolvers();
    resolve({ unpinned: 2, stayed: [next === null ? 9 : 8], next });
  }
  assert.deepEqual((await answer).body, {
    unpinned: 4,
    stayed: 2,
    stayedRanges: [{ firstFrame: 8, frames: 2 }],
  });
  assert.deepEqual(froms, [0, 256]);

  const client = net.connect(path);
  client.write("POST /v1/unpin HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n");
  await asked.promise;
  client.destroy();
  // The server has seen it when it has served another.
  await ask(path, "GET", "/v1/state");
  slice.resolve({ unpinned: 0, stayed: [], next: 512 });
  await ask(path, "GET", "/v1/state");
  assert.deepEqual(froms, [0, 256, 0], "no further slice is asked for");
});

test("a body of 64 KiB is read, a longer one is not, announced or not", async (t) => {
  const { path } = await serving(t, () => Promise.resolve() as never);
  const padded = (length: number) => JSON.stringify({ parked: true }).padEnd(length);
  assert.equal((await ask(path, "POST", "/v1/park", padded(65_536))).status, 200);
  const { status, body } = await ask(path, "POST", "/v1/park", padded(65_537));
  assert.deepEqual([status, (body as { error: { code: string } }).error.code], [413, "too_large"]);

  const client = net.connect(path);
  client.on("error", () => {}); // it may be writing when the other end closes
  client.write("POST /v1/park HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n");
  const chunk = `4000\r\n${" ".repeat(0x4000)}\r\n`;
  for (let i = 0; i < 8; i++) client.write(chunk);
  let said = "";
  for await (const piece of client) said += piece;
  assert.match(said, /^HTTP\/1\.1 413 /);
  assert.equal((await ask(path, "GET", "/v1/state")).status, 200);
});

test("bytes that are no HTTP end their connection only", async (t) => {
  const { path } = await serving(t, () => Promise.resolve() as never);
  for (const bytes of ["\0\x01\x02", "GET\r\n\r\n", "POST /v1/park HTTP/1.1\r\nContent-Length: -1\r\n\r\n"]) {
    const client = net.connect(path);
    client.end(bytes);
    let said = "";
    for await (const piece of client) said += piece;
    assert.match(said, /^HTTP\/1\.1 400 /);
  }
  assert.equal((await ask(path, "GET", "/v1/state")).status, 200);
});

test("the socket is for its user alone, and goes with the server", async (t) => {
  const { api, path } = await serving(t, () => Promise.resolve() as never);
  assert.equal(statSync(path).mode & 0o777, 0o600);
  api.close();
  assert.equal(existsSync(path), false);
});

/** What `listen` says about a path; undefined when it serves there. */
async function refusal(path: string): Promise<string | undefined> {
  try {
    (await ApiServer.listen(path, () => {})).close();
    return undefined;
  } catch (error) {
    assert.equal((error as { code: string }).code, "ERR_COIOMMU_USER");
    return (error as Error).message;
  }
}

test("a socket in use, a file and a path that leads nowhere are refused, and left alone", async (t) => {
  const { path } = await serving(t, () => Promise.resolve() as never);
  assert.match((await refusal(path))!, /--api .*another process serves there$/);
  assert.equal((await ask(path, "GET", "/v1/state")).status, 200);
  writeFileSync(`${path}.txt`, "precious");
  assert.match((await refusal(`${path}.txt`))!, /a file that is no socket is there$/);
  assert.equal(statSync(`${path}.txt`).size, 8);
  assert.match((await refusal(`${path}/none/here`))!, /--api .*(ENOENT|ENOTDIR|EACCES)/);
});

test("of two that find a socket that was left behind at the same moment, one serves there", async (t) => {
  const path = socketPath(t);
  const left = spawnSync(process.execPath, [
    "--eval",
    `require("node:net").createServer().listen(${JSON.stringify(path)}, () => process.kill(process.pid, "SIGKILL"))`,
  ]);
  assert.deepEqual([left.signal, statSync(path).isSocket()], ["SIGKILL", true]);

  const servers = await Promise.allSettled([1, 2].map(() => ApiServer.listen(path, () => {})));
  t.after(() => {
    for (const server of servers) if (server.status === "fulfilled") server.value.close();
  });
  assert.deepEqual(
    servers.map((server) => (server.status === "rejected" ? server.reason.message : "serves")).sort(),
    [`--api ${path}: another process is about to serve there`, "serves"],
  );
  assert.equal((await ask(path, "GET", "/openapi.json")).status, 200);
  assert.match((await refusal(path))!, /another process serves there$/);
});
