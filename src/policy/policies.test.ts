import assert from "node:assert/strict";
import test from "node:test";
import { random } from "../../test/support/random.ts";
import { type Gfn, milliseconds, type Nanoseconds } from "../base/units.ts";
import { generations } from "./generations.ts";
import { type Claim, definePolicy, GfnBuffer, type PolicyEntry, type UnpinPolicy } from "./policy.ts";
import { createFrom, createPolicy, policies, reconfigure } from "./registry.ts";

const at = (ms: number) => milliseconds(ms);
const frame = (gfn: number) => gfn as Gfn;

/** One call of candidates(). */
function given(policy: UnpinPolicy, now: Nanoseconds, framesMax = 1000, pressure = 1): number[] {
  const out = new GfnBuffer(1000);
  policy.candidates(now, { framesMax, pressure }, out);
  return Array.from({ length: out.length }, (_, i) => out.at(i));
}

/** A whole pass, in slices; what was given, in order. */
function pass(
  policy: UnpinPolicy,
  ms: number,
  outcome: (gfn: number) => Claim = () => "accessed",
  { framesMax = 1000, pressure = 1 } = {},
): number[] {
  const all: number[] = [];
  for (;;) {
    const slice = given(policy, at(ms), framesMax, pressure);
    if (slice.length === 0) return all;
    assert.ok(slice.length <= framesMax, `${slice.length} frames, more than ${framesMax}`);
    for (const gfn of slice) {
      assert.ok(!all.includes(gfn), `frame ${gfn} is given twice in a pass`);
      all.push(gfn);
      policy.tried(frame(gfn), outcome(gfn), at(ms));
    }
  }
}

const pin = (policy: UnpinPolicy, ms: number, ...gfns: number[]): void => {
  for (const gfn of gfns) policy.pinned(frame(gfn), at(ms));
};
const sorted = (gfns: readonly number[]) => [...gfns].sort((a, b) => a - b);

// --- what every policy does ----------------------------------------------------------------------------------------

/** Random events against a set: frames that are pinned, and those that a pass may give. Throws what is wrong. */
function checkAgainstModel(policy: UnpinPolicy, seed: number): void {
  const next = random(seed);
  const pinned = new Map<number, number>();
  const outcomes: Claim[] = ["claimed", "mapped", "accessed", "gone", "refused"];
  for (let ms = 1; ms < 2000; ms += next(2)) {
    const gfn = next(100) * 2 ** next(34);
    if (next(3) > 0) {
      if (!pinned.has(gfn)) pin(policy, ms, gfn);
      pinned.set(gfn, pinned.get(gfn) ?? ms);
    } else if (next(8) === 0) {
      policy.tried(frame(gfn), "gone", at(ms)); // without having been given, or known
      pinned.delete(gfn);
    } else {
      const tried = pass(
        policy,
        ms,
        (g) => {
          assert.ok(pinned.has(g), `frame ${g} is given, which is not pinned`);
          assert.ok(pinned.get(g)! < ms, `frame ${g} is given, which was pinned when the pass had begun`);
          const outcome = outcomes[next(outcomes.length)]!;
          if (outcome === "claimed" || outcome === "gone") pinned.delete(g);
          return outcome;
        },
        { framesMax: 1 + next(40), pressure: next(2) },
      );
      assert.equal(new Set(tried).size, tried.length);
    }
  }
  // No frame is lost: with time enough, each one is tried.
  const missing = new Set(pinned.keys());
  for (let ms = 1e6; missing.size > 0 && ms < 1e9; ms += 1e6)
    for (const gfn of pass(policy, ms)) missing.delete(gfn);
  assert.equal(missing.size, 0, `${missing.size} of ${pinned.size} frames are never tried again`);
}

for (const entry of policies.filter(({ name }) => name !== "off"))
  test(`${entry.name}: gives what is pinned since before the pass, once in a pass, and loses no frame`, () => {
    for (let seed = 1; seed <= 20; seed++) checkAgainstModel(createPolicy(entry.name), seed);
  });

/** As crosvm does with a threshold of 0: what was found busy is put back into no queue. */
const losesBusyFrames = definePolicy({
  ...generations,
  create(values) {
    const inner = generations.create(values);
    const tried = (gfn: Gfn, outcome: Claim, now: Nanoseconds) =>
      inner.tried(gfn, outcome === "mapped" ? "gone" : outcome, now);
    return { ...inner, tried };
  },
});
const givesTwice = definePolicy({
  ...generations,
  create: (values) => ({ ...generations.create(values), tried: () => {} }),
});
const givesWhatIsNew = definePolicy({
  ...generations,
  create(values) {
    const inner = generations.create(values);
    return { ...inner, pinned: (gfn: Gfn, now: Nanoseconds) => inner.pinned(gfn, (now - 1) as Nanoseconds) };
  },
});
for (const [what, twin, message] of [
  ["that loses what it found busy", losesBusyFrames, /never tried again/],
  ["that gives a frame twice in a pass", givesTwice, /twice in a pass/],
  ["that gives what was pinned when the pass had begun", givesWhatIsNew, /when the pass had begun/],
] as const)
  test(`broken twin: a policy ${what} is found`, () =>
    assert.throws(() => {
      for (let seed = 1; seed <= 20; seed++)
        checkAgainstModel(createFrom(twin as PolicyEntry, "generations"), seed);
    }, message));

test("every policy of the registry is made by its name, has its parameters, and says where it comes from", () => {
  for (const { name, source, summary, parameters } of policies) {
    const policy = createPolicy(name);
    assert.equal(policy.name, name);
    assert.deepEqual(Object.keys(policy.parameters), Object.keys(parameters));
    assert.ok(source.length > 10 && summary.length > 10);
  }
});

// --- what each one does --------------------------------------------------------------------------------------------

test("lru: the longest untried first, all of them in each pass", () => {
  const policy = createPolicy("lru");
  pin(policy, 1, 5, 3, 2 ** 33, 9);
  assert.deepEqual(pass(policy, 2), [5, 3, 2 ** 33, 9]);
  policy.tried(frame(3), "mapped", at(3));
  assert.deepEqual(pass(policy, 4), [5, 2 ** 33, 9, 3]);
});

test("off: gives nothing", () => {
  const policy = createPolicy("off");
  pin(policy, 1, 1);
  assert.deepEqual(pass(policy, 2), []);
});

test("generations: what threshold passes found busy is tried by every threshold-th pass, and is young when it is back", () => {
  const policy = createPolicy("generations,threshold=3");
  pin(policy, 0, 1, 2);
  const busy = (gfn: number): Claim => (gfn === 1 ? "mapped" : "accessed");
  const tried = Array.from({ length: 9 }, (_, i) => sorted(pass(policy, 1 + i, busy)));
  assert.deepEqual(tried, [[1, 2], [1, 2], [1, 2], [], [], [1, 2], [], [], [1, 2]]);
  assert.deepEqual(policy.state?.(), { young: 0, old: 2 });
  policy.tried(frame(1), "claimed", at(10));
  pin(policy, 10, 1);
  assert.deepEqual(policy.state?.(), { young: 1, old: 1 });
  assert.deepEqual(pass(policy, 11), [1]);
});

test("generations: a try that the host refused does not age a frame; with threshold 0 none gets old", () => {
  const refused = createPolicy("generations,threshold=1");
  pin(refused, 0, 1);
  for (let i = 1; i < 5; i++)
    assert.deepEqual(
      pass(refused, i, () => "refused"),
      [1],
    );
  assert.deepEqual(refused.state?.(), { young: 1, old: 0 });
  const young = createPolicy("generations,threshold=0");
  pin(young, 0, 1);
  for (let i = 1; i < 20; i++)
    assert.deepEqual(
      pass(young, i, () => "mapped"),
      [1],
    );
});

test("clock: the hand goes around in so many passes, and on from where it was", () => {
  const policy = createPolicy("clock,passes=3");
  pin(policy, 0, 1, 2, 3, 4, 5, 6, 7);
  const tried = [1, 2, 3, 4].map((ms) => pass(policy, ms));
  assert.deepEqual(tried, [
    [1, 2, 3],
    [4, 5, 6],
    [7, 1, 2],
    [3, 4, 5],
  ]);
});

test("working-set: a frame is tried when T has passed since its last try", () => {
  const policy = createPolicy("working-set,min=100ms,max=100ms");
  pin(policy, 0, 1);
  pin(policy, 60, 2);
  assert.deepEqual(pass(policy, 100), []);
  assert.deepEqual(pass(policy, 101), [1]);
  assert.deepEqual(pass(policy, 161), [2]);
  assert.deepEqual(pass(policy, 201), []);
  assert.deepEqual(pass(policy, 202), [1]);
});

test("working-set: T lengthens towards the interval at which frames come back, and shortens while none does", () => {
  const policy = createPolicy("working-set,min=100ms,max=1s,decay=1%");
  const windowMs = () => policy.state!().windowMs!;
  let ms = 0;
  pin(policy, ms, 1);
  for (let round = 0; round < 20; round++) {
    ms += windowMs() + 1;
    assert.deepEqual(
      pass(policy, ms, () => "claimed"),
      [1],
    );
    ms += 200 - (windowMs() % 100);
    pin(policy, ms, 1);
  }
  assert.ok(windowMs() > 250 && windowMs() <= 1000, `${windowMs()} ms`);
  const learnt = windowMs();
  for (let i = 0; i < 100; i++) pass(policy, ++ms);
  assert.ok(windowMs() < learnt / 2, `${windowMs()} ms after ${learnt} ms`);
  for (let i = 0; i < 500; i++) pass(policy, ++ms);
  assert.equal(windowMs(), 100);
});

test("working-set: a frame that comes back after much longer than T teaches nothing", () => {
  const policy = createPolicy("working-set,min=100ms,max=10s");
  pin(policy, 0, 1);
  pass(policy, 200, () => "claimed");
  pin(policy, 5000, 1);
  assert.equal(policy.state!().windowMs, 100);
});

test("working-set: remembers so many unpinned frames, and forgets the oldest", () => {
  const policy = createPolicy("working-set,min=1ms,ghosts=3");
  pin(policy, 0, 1, 2, 3, 4, 5);
  pass(policy, 10, () => "claimed");
  assert.equal(policy.state!().ghosts, 3);
  pin(policy, 12, 5);
  assert.equal(policy.state!().ghosts, 2);
});

test("pressure: nothing while the host has memory, a part between low and high, then all", () => {
  const policy = createPolicy("pressure,low=10%,high=50%");
  pin(policy, 0, 1, 2, 3, 4);
  const tried = [0, 0.05, 0.1, 0.3, 0.5, 1].map((pressure, i) =>
    pass(policy, 1 + i, () => "accessed", { pressure }),
  );
  assert.deepEqual(tried, [[], [], [], [1, 2], [3, 4, 1, 2], [3, 4, 1, 2]]);
  assert.equal(policy.pressureFile?.(), "/proc/pressure/memory");
});

test("parameters change while a policy runs, and it keeps what it knows", () => {
  const policy = createPolicy("clock,passes=2");
  pin(policy, 0, 1, 2, 3, 4);
  assert.deepEqual(pass(policy, 1), [1, 2]);
  reconfigure(policy, createPolicy("clock,passes=1"));
  assert.deepEqual(policy.parameters, { passes: 1 });
  assert.deepEqual(pass(policy, 2), [3, 4, 1, 2]);
});

// --- how they are chosen -------------------------------------------------------------------------------------------

for (const [choice, parameters] of [
  ["clock", { passes: 4 }],
  ["clock,passes=7", { passes: 7 }],
  ["working-set,min=2s,decay=5%", { min: 2000, max: 30_000, decay: 0.05, ghosts: 65_536 }],
  ["working-set,min=250,decay=0.5", { min: 250, max: 30_000, decay: 0.5, ghosts: 65_536 }],
  [
    "pressure,file=/sys/fs/cgroup/memory.pressure",
    { low: 0.01, high: 0.1, file: "/sys/fs/cgroup/memory.pressure" },
  ],
] as const)
  test(`--policy ${choice} has the parameters ${JSON.stringify(parameters)}`, () =>
    assert.deepEqual(createPolicy(choice).parameters, parameters));

for (const [choice, message] of [
  ["", /no policy is named "".*lru/],
  ["LRU", /no policy is named "LRU"/],
  ["lru,age=1", /has no parameter "age"; it has none/],
  ["clock,pass=1", /has no parameter "pass"; it has passes/],
  ["clock,toString=1", /has no parameter "toString"/],
  ["clock,passes", /passes takes a whole number from 1 to 1000/],
  ["clock,passes=0", /from 1 to 1000/],
  ["clock,passes=1.5", /from 1 to 1000/],
  ["clock,passes=1e2", /from 1 to 1000/],
  ["working-set,decay=101%", /decay takes a share from 0% to 100%/],
  ["working-set,min=soon", /min takes a time from 0ms to 3600s/],
  ["pressure,file=", /file takes a text/],
] as const)
  test(`--policy "${choice}" is refused with wrong usage`, () =>
    assert.throws(() => createPolicy(choice), { code: "ERR_COIOMMU_USER", exitCode: 2, message }));
