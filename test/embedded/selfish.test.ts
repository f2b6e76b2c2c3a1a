/** Guests that claim what they do not use: seen, bounded by their quota, and nobody else's trouble. */
import assert from "node:assert/strict";
import { type TestContext, test } from "node:test";
import { milliseconds } from "../../src/base/units.ts";
import { ApiServer } from "../../src/control/api/server.ts";
import { EmbeddedMachine } from "../../src/control/embedded.ts";
import type { EmbeddedOptions } from "../../src/control/embedded-plan.ts";
import type { RunResult } from "../../src/control/result.ts";
import { run } from "../../src/control/run.ts";
import { parseWorkload } from "../../src/control/workload.ts";
import { ask, socketPath } from "../support/api.ts";
import { eventually } from "../support/eventually.ts";
import { IDLE } from "./selfish-cpu.ts";

const QUOTA = 512;
const HONEST_QUOTA = 4096;

const options: EmbeddedOptions = {
  memoryMiB: 128,
  cpus: 1,
  strategy: "coiommu",
  policy: "lru",
  // No pass but those that requests at the quota make.
  interval: milliseconds(600_000),
  quota: QUOTA,
  beforeActivation: "none",
  activationTimeout: Number.POSITIVE_INFINITY,
  pinner: "software",
  disk: { sizeMiB: 64 },
  workload: parseWorkload("idle:seconds=3"),
};
const entry = (name: string) => new URL(`./${name}.ts`, import.meta.url);
const SELFISH = { ...options, cpuEntry: entry("selfish-cpu") };
const HONEST = {
  ...options,
  ...{ cpus: 2, interval: milliseconds(50), quota: HONEST_QUOTA },
  workload: parseWorkload("fio:rw=randrw,bs=4k,iodepth=8,seconds=2,size=8M"),
};

interface State {
  readonly quotaFrames: number;
  readonly pinned: number;
  readonly framesClaimed: number;
  readonly framesNeverTransferred: number;
  readonly parked: boolean;
}

/** A guest under way behind an API of its own. */
async function running(t: TestContext, settings: EmbeddedOptions) {
  const path = socketPath(t);
  const api = await ApiServer.listen(path, (text) => t.diagnostic(text));
  t.after(() => api.close());
  const ended = run(
    { ...settings, api },
    () => EmbeddedMachine.start(settings),
    () => {},
  );
  ended.catch(() => {});
  const send = async <T>(method: string, route: string, body?: unknown) =>
    (await ask(path, method, route, body)).body as T;
  const result = async (): Promise<RunResult> => {
    const { result, complaints } = await ended;
    assert.deepEqual(complaints, []);
    return result;
  };
  const state = () => send<State>("GET", "/v1/state");
  const counters = () => send<{ tracking?: { pinRequestsRefused: number } }>("GET", "/v1/counters");
  return {
    result,
    send,
    state,
    refused: () => eventually(async () => ((await counters()).tracking?.pinRequestsRefused ?? 0) > 0),
    until: (is: (s: State) => boolean) => eventually(async () => is(await state())),
  };
}

const checkSelfish = ({ framesPeak, framesAtEnd, framesUnpinned, refused, ...pins }: RunResult["pins"]) => {
  assert.deepEqual([framesPeak, framesAtEnd, pins.quotaFrames], [QUOTA, QUOTA, QUOTA]);
  assert.equal(framesUnpinned, IDLE, "what was idle was unpinned before a request was refused");
  assert.ok(refused! > QUOTA);
  assert.deepEqual([pins.framesClaimed, pins.framesNeverTransferred], [QUOTA, QUOTA]);
};
/** A workload that uses what it claims: what is claimed at the end has been used, but for what a ring did not come to. */
const checkHonest = ({ pins, workload, dma }: RunResult) => {
  assert.deepEqual([workload.verified, workload.errors, dma.faults], [true, 0, 0]);
  assert.ok(pins.framesClaimed! > 0);
  assert.ok(pins.framesNeverTransferred! <= pins.framesClaimed! / 20, `${pins.framesNeverTransferred}`);
};

test("a guest that claims and never transfers has its quota and no more, and is seen", async (t) => {
  const selfish = await running(t, SELFISH);
  assert.ok(await selfish.until((s) => s.framesNeverTransferred === QUOTA && s.pinned === QUOTA));
  checkSelfish((await selfish.result()).pins);
});

test("two guests at once share nothing but the host", async (t) => {
  const [selfish, honest] = await Promise.all([running(t, SELFISH), running(t, HONEST)]);
  // From its first refusal on it has all that it gets: before, it is at the quota once with what it leaves idle.
  assert.ok(await selfish.refused());
  assert.ok(await honest.until((s) => s.framesClaimed > 0));
  assert.deepEqual(await selfish.send("POST", "/v1/park", { parked: true }), {
    parked: true,
    parks: { guest: 0, operator: true },
  });
  const [a, b] = await Promise.all([selfish.state(), honest.state()]);
  assert.deepEqual([a.quotaFrames, a.pinned, a.parked], [QUOTA, QUOTA, true]);
  assert.deepEqual([b.quotaFrames, b.parked], [HONEST_QUOTA, false]);
  const results = await Promise.all([selfish.result(), honest.result()]);
  checkSelfish(results[0].pins);
  checkHonest(results[1]);
  const { refused, quotaFrames, framesPeak, framesUnpinned } = results[1].pins;
  assert.deepEqual([refused, quotaFrames], [0, HONEST_QUOTA]);
  assert.ok(framesPeak > QUOTA && framesUnpinned > 0, "it has what it wants, and its passes go on");
});

test("broken twin: behind a gate that does not tell, an honest guest looks selfish", async (t) => {
  const { pins, workload, ...rest } = await (
    await running(t, { ...HONEST, deviceEntry: entry("blind-device") })
  ).result();
  assert.deepEqual([workload.verified, pins.framesNeverTransferred], [true, pins.framesClaimed]);
  assert.throws(() => checkHonest({ pins, workload, ...rest }), assert.AssertionError);
});
