import assert from "node:assert/strict";
import test from "node:test";
import { explore, type SmallWorld } from "../../src/sim/explore.ts";
import { TU_ACCESSED as A, TU_DIRTY as D, TU_PINNED as P } from "../../src/wire/dtt.ts";
import { rareTwins, twins } from "./twins.ts";

/** Worlds of which every schedule is played, with the production driver, gate and tracker. */
const worlds: Readonly<Record<string, SmallWorld>> = {
  "an idle frame, two passes, two CPUs that map it": { units: [P], cpus: [[0], [0]], passes: 2 },
  "an accessed frame, three passes, a CPU that maps it twice": { units: [P + A], cpus: [[0, 0]], passes: 3 },
  "a frame that is not pinned, two CPUs that ask for it": { units: [0], cpus: [[0], [0]], passes: 2 },
  "two CPUs that map two frames, in opposite order": {
    units: [P, 0],
    cpus: [
      [0, 1],
      [1, 0],
    ],
    passes: 1,
  },
  "a host that may refuse each pin and each release": {
    units: [P, P],
    cpus: [[0], [1]],
    passes: 2,
    releasesFail: true,
    pinsFail: true,
  },
  "an extent of which one frame goes, and a host that may refuse each release and pin": {
    units: [P, P + A],
    extent: true,
    cpus: [[0], [1]],
    passes: 1,
    releasesFail: true,
    pinsFail: true,
  },
  "two force-unpins of a frame that was mapped lately, two CPUs that map it": {
    units: [P + A],
    cpus: [[0], [0]],
    passes: 0,
    forced: 2,
  },
  "harvests of a frame that two CPUs map": { units: [P], cpus: [[0], [0]], passes: 1, harvests: 1 },
  "a harvest of two frames, one of them dirty": { units: [P + D, P], cpus: [[0, 1]], passes: 2, harvests: 2 },
  "two CPUs, of which each asks for a frame, while the other frame is pinned unasked": {
    units: [0, 0],
    cpus: [[0], [1]],
    passes: 0,
    speculate: "neighbours,budget=1",
  },
  "a frame that is pinned unasked and unpinned while a CPU maps it, and a host that may refuse each pin and each release":
    {
      units: [0, 0],
      cpus: [[0, 1]],
      passes: 1,
      releasesFail: true,
      pinsFail: true,
      speculate: "neighbours,budget=1",
    },
  "harvests of a frame that is pinned unasked": {
    units: [0, 0],
    cpus: [[0, 1]],
    passes: 1,
    harvests: 1,
    speculate: "neighbours,budget=1",
  },
  "a quota that makes one CPU's request unpin what another maps": {
    units: [P, 0],
    cpus: [[0], [1]],
    passes: 1,
    quota: 1,
  },
};

for (const [what, world] of Object.entries(worlds))
  test(`every schedule: ${what}`, (t) => {
    const { failure, ...seen } = explore(world);
    t.diagnostic(JSON.stringify(seen));
    assert.equal(failure, undefined);
    // The schedules must show the race: a CPU that came too late for the old pin, and one that did not.
    assert.ok(seen.asks > 0 && seen.states > 100);
    assert.equal(seen.unpins > 0, world.passes + (world.forced ?? 0) > 0);
    assert.equal(seen.refusals > 0, world.pinsFail === true || world.quota !== undefined);
  });

/** What each twin breaks shows in these worlds; the others need a life or a queue, which small worlds do not have. */
const worldsOfTwins: Readonly<Record<string, SmallWorld>> = {
  "an unpin by load and store instead of one CAS": { units: [P], cpus: [[0]], passes: 1 },
  "an unpin that ignores COUNT": { units: [P], cpus: [[0]], passes: 1 },
  "a force-unpin that ignores COUNT": { units: [P + A], cpus: [[0]], passes: 1, forced: 1 },
  "an extent that is released before its rest is pinned": {
    units: [P, P],
    extent: true,
    cpus: [[0]],
    passes: 1,
  },
  "P cleared after the release": { units: [P], cpus: [[0]], passes: 1 },
  "P set before the page is pinned": { units: [0], cpus: [[0], [0]], passes: 0 },
  "a frame that is pinned unasked after P is set": {
    units: [0, 0],
    cpus: [[0], [1]],
    passes: 0,
    speculate: "neighbours,budget=1",
  },
  "an IOMMU that keeps what was revoked": { units: [P], cpus: [], passes: 1 },
  "no quota": { units: [P, 0], cpus: [[0], [1]], passes: 0, quota: 1 },
  "a harvest by load and store": { units: [P + D], cpus: [[0]], passes: 0, harvests: 1 },
  "a harvest that does not look at W": { units: [P], cpus: [[0]], passes: 0, harvests: 1 },
  "an unpin that forgets D": { units: [P], cpus: [[0]], passes: 2, harvests: 0 },
  "a driver that sets D after it has counted down": { units: [P], cpus: [[0]], passes: 0, harvests: 1 },
  "a driver that sets no D": { units: [P], cpus: [[0]], passes: 0, harvests: 0 },
  "a driver that looks at P before it counts": { units: [P], cpus: [[0]], passes: 1 },
  "a driver that counts down by load and store": { units: [P], cpus: [[0], [0]], passes: 1 },
};

for (const [what, world] of Object.entries(worldsOfTwins))
  test(`every schedule: broken twin is found: ${what}`, (t) => {
    const { twin, found } = { ...twins, ...rareTwins }[what]!;
    assert.equal(explore(world).failure, undefined, "the same world is sound with the production code");
    const { failure } = explore(world, typeof twin === "function" ? twin() : twin);
    t.diagnostic(`${failure?.message}, after ${failure?.steps.join(" ")}`);
    assert.match(failure?.message ?? "none", found);
  });
