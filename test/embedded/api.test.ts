/** `--api PATH` over the embedded machine, as its user sees it. */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { existsSync } from "node:fs";
import { type TestContext, test } from "node:test";
import { Errors } from "typebox/schema";
import { type Answer, ask, socketPath } from "../support/api.ts";
import { Cli, complaint } from "../support/cli.ts";
import { eventually } from "../support/eventually.ts";

const EMBEDDED = ["--machine", "embedded", "--memory", "256M", "--interval", "100ms"];

interface State {
  readonly life: string;
  readonly pinned: number;
  readonly framesClaimed: number;
  readonly framesNeverTransferred: number;
  readonly uptimeMs: number;
}
interface Counters {
  readonly tracking: Readonly<Record<string, number | null>>;
  readonly devices: readonly Readonly<Record<string, number | string>>[];
  readonly driver: Readonly<Record<string, number>> | null;
}

/** A running guest, and what asks its API; every answer is as its own document says. */
async function running(t: TestContext, path: string, ...args: string[]) {
  const cli = new Cli(["run", ...EMBEDDED, "--api", path, ...args]);
  t.after(() => cli.child.kill("SIGKILL"));
  await cli.said("running ");
  const { body: document } = await ask(path, "GET", "/openapi.json");
  const checked = async (method: string, route: string, body?: unknown): Promise<Answer> => {
    const answer = await ask(path, method, route, body);
    const problems = differences(document, method, route, answer);
    assert.deepEqual(problems, [], `${method} ${route}: ${JSON.stringify(answer.body)}`);
    return answer;
  };
  const get = async <T>(route: string): Promise<T> => (await checked("GET", route)).body as T;
  return { cli, get, ask: checked };
}

// biome-ignore lint/suspicious/noExplicitAny: a document that a stranger reads.
function differences(document: any, method: string, route: string, { status, body }: Answer): unknown[] {
  const { responses } = document.paths[route]?.[method.toLowerCase()] ?? { responses: {} };
  const { content } = responses[status] ?? document.components.responses.Failure;
  return Errors(content["application/json"].schema, body)[1];
}

async function ends(cli: Cli, path: string): Promise<void> {
  cli.child.kill("SIGINT");
  const ended = await cli.ended;
  assert.equal(ended.code, 130, ended.stderr);
  assert.match(complaint(ended), /SIGINT/);
  assert.equal(existsSync(path), false, "the socket is gone");
}

test("a busy guest is watched and steered, by two clients at once", async (t) => {
  const path = socketPath(t);
  const {
    cli,
    get,
    ask: send,
  } = await running(t, path, "--workload", "fio:rw=randread,bs=4k,seconds=600,size=8M");
  const state = await get<State>("/v1/state");
  const { pinned: held, framesClaimed, framesNeverTransferred, uptimeMs } = state;
  assert.deepEqual(
    {
      ...{ ...state, pinned: held > 0, framesClaimed: framesClaimed > 0 },
      ...{ framesNeverTransferred: framesNeverTransferred >= 0, uptimeMs: uptimeMs > 0 },
    },
    {
      ...{
        machine: "embedded",
        strategy: "coiommu",
        life: "tracked",
        ...{ policy: { name: "lru", parameters: {} }, intervalMs: 100 },
        background: null,
      },
      ...{ framesClaimed: true, framesNeverTransferred: true },
      ...{ quotaFrames: null, pinned: true, parked: false, parks: { guest: 0, operator: false } },
      ...{ endpoints: ["0000:00:04.0"], uptimeMs: true },
    },
  );

  // Parked, nothing goes, not even on demand.
  assert.deepEqual((await send("POST", "/v1/park", { parked: true })).body, {
    parked: true,
    parks: { guest: 0, operator: true },
  });
  const refused = await send("POST", "/v1/unpin");
  assert.deepEqual([refused.status, errorOf(refused).code], [409, "refused"]);
  const parked = await get<Counters>("/v1/counters");
  assert.equal((await send("POST", "/v1/park", { parked: false })).status, 200);

  // A lower quota refuses pins, and the workload gets by.
  const { pinned } = (await send("PUT", "/v1/quota", { quotaFrames: 8 })).body as State;
  assert.ok(pinned > 8, "nothing is torn out");
  const refusals = async () => (await get<Counters>("/v1/counters")).tracking.pinRequestsRefused!;
  assert.ok(await eventually(async () => (await refusals()) > 0, 5000), "pins are refused");
  const unlimited = (await send("PUT", "/v1/quota", { quotaFrames: null })).body as { quotaFrames: null };
  assert.equal(unlimited.quotaFrames, null);

  // Two clients at once; each gets its own answers.
  const [policies, unpins] = await Promise.all([
    Promise.all(["off", "lru"].map((name) => send("PUT", "/v1/policy", { name }))),
    Promise.all([{}, { firstFrame: 0, frames: 65_536 }].map((range) => send("POST", "/v1/unpin", range))),
  ]);
  assert.deepEqual(policies.map((a) => a.status).concat(unpins.map((a) => a.status)), [200, 200, 200, 200]);
  for (const { body } of unpins) {
    const { unpinned, stayed } = body as { unpinned: number; stayed: number };
    assert.ok(unpinned + stayed > 0);
  }
  const after = await get<Counters>("/v1/counters");
  assert.ok(after.tracking.framesUnpinned! > parked.tracking.framesUnpinned!);
  assert.ok(after.driver!.map! > parked.driver!.map!, "it works on");
  assert.deepEqual(
    after.devices.map((d) => [d.endpoint, d.faults]),
    [["0000:00:04.0", 0]],
  );
  await ends(cli, path);
});

test("one policy after the other, with parameters and an interval that change live", async (t) => {
  const path = socketPath(t);
  const {
    cli,
    get,
    ask: send,
  } = await running(t, path, "--workload", "fio:rw=randread,bs=4k,seconds=600,size=8M");
  const put = async (body: object) => (await send("PUT", "/v1/policy", body)).body as Policy;
  const young = await put({ name: "generations", parameters: { threshold: 2 } });
  assert.deepEqual([young.name, young.parameters, young.intervalMs], ["generations", { threshold: 2 }, 100]);
  assert.ok(
    await eventually(async () => (await get<Policy>("/v1/policy")).state.old! > 0, 5000),
    "frames get old",
  );
  const same = await put({ parameters: { threshold: 3 }, intervalMs: { min: 50, max: 200 } });
  assert.deepEqual([same.parameters, same.intervalMs], [{ threshold: 3 }, { min: 50, max: 200 }]);
  assert.ok(same.state.old! > 0, "it keeps what it knows");
  assert.ok(same.intervalNowMs >= 50 && same.intervalNowMs <= 200);
  assert.deepEqual((await put({ name: "lru", intervalMs: 100 })).state, {});
  assert.equal((await get<Counters>("/v1/counters")).devices[0]!.faults, 0);
  await ends(cli, path);
});

test("speculation is chosen and changed live; one that has switched itself off is on when it is set again", async (t) => {
  const path = socketPath(t);
  const {
    cli,
    get,
    ask: send,
  } = await running(t, path, "--workload", "gpu:buffers=2,size=2M,hold=100,seconds=600");
  const put = async (body: object) => (await send("PUT", "/v1/policy", body)).body as Policy;
  const speculation = async () => (await get<Policy>("/v1/policy")).speculate;
  assert.deepEqual(await speculation(), {
    ...{ name: "off", parameters: {} },
    ...{ saved: 0, wasted: 0, stopped: null },
  });
  const losing = { name: "neighbours", parameters: { judged: 16, budget: 64 } };
  const { speculate } = await put({ speculate: losing });
  assert.deepEqual([speculate.name, speculate.parameters], [losing.name, losing.parameters]);
  const stops = () => eventually(async () => (await speculation()).stopped !== null, 20_000);
  assert.ok(await stops(), "few of these frames are used");
  const { saved, wasted, stopped } = await speculation();
  assert.match(stopped!, /^of the last 16 frames that it pinned, the guest used \d$/);
  assert.ok(saved + wasted >= 16);
  assert.ok((await get<Counters>("/v1/counters")).tracking.framesSpeculative! >= saved + wasted);
  assert.equal((await put({ speculate: { name: "neighbours" } })).speculate.stopped, null);
  assert.deepEqual((await put({ speculate: { name: "ghost" } })).speculate.parameters, {
    ...{ budget: 32, judged: 256, together: 2000, ghosts: 65_536 },
  });
  assert.equal((await put({ speculate: { name: "off" } })).speculate.name, "off");
  assert.equal((await get<Counters>("/v1/counters")).devices[0]!.faults, 0);
  cli.child.kill("SIGINT");
  const { stderr } = await cli.ended;
  assert.match(
    stderr,
    /^coiommu: warning: --speculate neighbours,judged=16,budget=64 has switched itself off: of/m,
  );
});

interface Policy {
  readonly speculate: {
    readonly name: string;
    readonly parameters: object;
    readonly saved: number;
    readonly wasted: number;
    readonly stopped: string | null;
  };
  readonly name: string;
  readonly parameters: object;
  readonly state: Readonly<Record<string, number>>;
  readonly intervalMs: unknown;
  readonly intervalNowMs: number;
}

interface Harvest {
  readonly frames: number;
  readonly ranges: readonly { readonly firstFrame: number; readonly frames: number }[];
}

test("what a busy disk writes is harvested until it is stopped", async (t) => {
  const path = socketPath(t);
  const { cli, ask: send } = await running(
    t,
    path,
    "--workload",
    "fio:rw=randread,bs=4k,seconds=600,size=8M",
  );
  const harvest = async () => (await send("POST", "/v1/dirty/harvest")).body as Harvest;
  assert.deepEqual((await send("POST", "/v1/dirty/start")).body, { dirtyTracking: true });
  for (let round = 0; round < 3; round++) {
    const { frames, ranges } = await harvest();
    assert.ok(frames > 0);
    assert.equal(
      ranges.reduce((sum, range) => sum + range.frames, 0),
      frames,
    );
    assert.ok(ranges.every((range) => range.firstFrame + range.frames <= 65_536));
  }
  const both = await Promise.all([send("POST", "/v1/dirty/harvest"), send("POST", "/v1/dirty/harvest")]);
  for (const { status } of both) assert.ok(status === 200 || status === 409);
  assert.deepEqual((await send("POST", "/v1/dirty/stop")).body, { dirtyTracking: false });
  const after = await send("POST", "/v1/dirty/harvest");
  assert.deepEqual([after.status, errorOf(after).message], [409, "dirty tracking has not been started"]);
  await ends(cli, path);
});

const errorOf = ({ body }: Answer) =>
  (body as { error: { code: string; message: string; field: string | null } }).error;

test("every request that is wrong is told so, with the field", async (t) => {
  const path = socketPath(t);
  const { cli, ask: send } = await running(t, path, "--workload", "idle:seconds=600");
  for (const [method, route, body, status, code, field] of [
    ["GET", "/v2/state", undefined, 404, "not_found", null],
    ["GET", "/v1/state/", undefined, 404, "not_found", null],
    ["POST", "/v1/state", {}, 405, "method_not_allowed", null],
    ["DELETE", "/v1/policy", undefined, 405, "method_not_allowed", null],
    ["GET", "/v1/unpin", undefined, 405, "method_not_allowed", null],
    ["PUT", "/v1/policy", "lru", 400, "invalid", null],
    ["PUT", "/v1/policy", [], 400, "invalid", null],
    ["PUT", "/v1/policy", {}, 400, "invalid", null],
    ["PUT", "/v1/policy", { name: "./nowhere.ts" }, 400, "invalid", "name"],
    ["PUT", "/v1/policy", { parameters: { passes: 1 } }, 400, "invalid", "parameters"],
    ["PUT", "/v1/policy", { intervalMs: 1 }, 400, "invalid", "intervalMs"],
    ["PUT", "/v1/policy", { intervalMs: { min: 20, max: 10 } }, 400, "invalid", "intervalMs"],
    ["PUT", "/v1/policy", { name: "mru" }, 400, "invalid", "name"],
    ["PUT", "/v1/policy", { name: "lru", parameters: { age: 1 } }, 400, "invalid", "parameters"],
    ["PUT", "/v1/policy", { name: "lru", parameters: { age: [] } }, 400, "invalid", "parameters.age"],
    ["PUT", "/v1/policy", { name: "lru", speed: 1 }, 400, "invalid", "speed"],
    ["PUT", "/v1/policy", { speculate: { name: "luck" } }, 400, "invalid", "speculate"],
    ["PUT", "/v1/policy", { speculate: { parameters: {} } }, 400, "invalid", "speculate.name"],
    [
      "PUT",
      "/v1/policy",
      { speculate: { name: "off", parameters: { budget: 1 } } },
      400,
      "invalid",
      "speculate",
    ],
    ["PUT", "/v1/quota", {}, 400, "invalid", "quotaFrames"],
    ["PUT", "/v1/quota", { quotaFrames: -1 }, 400, "invalid", "quotaFrames"],
    ["PUT", "/v1/quota", { quotaFrames: 1.5 }, 400, "invalid", "quotaFrames"],
    ["PUT", "/v1/quota", { quotaFrames: "10%" }, 400, "invalid", "quotaFrames"],
    ["PUT", "/v1/quota", { quotaFrames: 2 ** 41 }, 400, "invalid", "quotaFrames"],
    ["POST", "/v1/park", { parked: 1 }, 400, "invalid", "parked"],
    ["POST", "/v1/park", undefined, 400, "invalid", "parked"],
    ["POST", "/v1/unpin", { frames: 0 }, 400, "invalid", "frames"],
    ["POST", "/v1/unpin", { firstFrame: -1 }, 400, "invalid", "firstFrame"],
    ["GET", "/v1/dirty/harvest", undefined, 405, "method_not_allowed", null],
    ["POST", "/v1/dirty/harvest", undefined, 409, "refused", null],
    ["PUT", "/v1/balloon", { memoryMiB: 0 }, 400, "invalid", "memoryMiB"],
    ["PUT", "/v1/balloon", { memoryMiB: 256 }, 409, "refused", null],
  ] as const) {
    const answer = await send(method, route, body);
    const error = errorOf(answer);
    assert.deepEqual([answer.status, error.code, error.field], [status, code, field], JSON.stringify(answer));
    if (field) assert.ok(error.message.includes(field.split(".")[0]!), error.message);
    if (status === 405) assert.ok(answer.headers.allow);
  }
  await ends(cli, path);
});

test("a socket that a killed run has left is replaced; the answers of an untracked guest", async (t) => {
  const path = socketPath(t);
  const killed = await running(t, path, "--workload", "idle:seconds=600");
  killed.cli.child.kill("SIGKILL");
  await killed.cli.ended;
  assert.ok(existsSync(path));

  const {
    cli,
    get,
    ask: send,
  } = await running(t, path, "--strategy", "static", "--workload", "idle:seconds=3");
  const [state, counters] = [await get<State>("/v1/state"), await get<Counters>("/v1/counters")];
  assert.deepEqual([state.life, state.pinned], ["static", 65_536]);
  assert.deepEqual(
    [counters.tracking.pinRequests, counters.tracking.passes, counters.driver],
    [null, null, null],
  );
  for (const [method, route, body] of [
    ["GET", "/v1/policy"],
    ["PUT", "/v1/policy", { name: "off" }],
    ["PUT", "/v1/quota", { quotaFrames: 1000 }],
    ["POST", "/v1/park", { parked: true }],
    ["POST", "/v1/unpin"],
  ] as const)
    assert.equal((await send(method, route, body)).status, 409, `${method} ${route}`);

  const second = await new Cli(["run", ...EMBEDDED, "--api", path]).ended;
  assert.equal(second.code, 1);
  assert.match(complaint(second), /another process serves there/);
  assert.equal((await cli.ended).code, 0);
  assert.equal(existsSync(path), false);
});

test("the result tells the policy and the quota at the end; compare serves through all its runs", async (t) => {
  const path = socketPath(t);
  const args = [
    "--strategies",
    "none,coiommu",
    "--rounds",
    "1",
    "--workload",
    "idle:seconds=2",
    "--json",
    "-",
  ];
  const cli = new Cli(["compare", ...EMBEDDED, "--api", path, ...args]);
  await cli.said("coiommu: running");
  assert.equal((await ask(path, "PUT", "/v1/policy", { name: "off" })).status, 200);
  assert.equal((await ask(path, "PUT", "/v1/quota", { quotaFrames: 777 })).status, 200);
  const { code, stdout, stderr } = await cli.ended;
  assert.equal(code, 0, stderr);
  const [, run] = JSON.parse(stdout).runs;
  assert.deepEqual([run.policy, run.pins.quotaFrames], ["off", 777]);
});

test("curl, as README has it", { skip: spawnSync("curl", ["-V"]).error && "no curl" }, async (t) => {
  const path = socketPath(t);
  const { cli } = await running(t, path, "--workload", "idle:seconds=600");
  const { stdout, stderr } = spawnSync(
    "curl",
    ["-sS", "--unix-socket", path, "-X", "PUT", "-d", '{"quotaFrames":4096}', "http://localhost/v1/quota"],
    { encoding: "utf8" },
  );
  assert.deepEqual([JSON.parse(stdout).quotaFrames, stderr], [4096, ""]);
  await ends(cli, path);
});
