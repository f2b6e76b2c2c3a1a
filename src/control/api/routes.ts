import type { Static, TSchema } from "typebox";
import { UserError } from "../../base/errors.ts";
import { listed } from "../../base/ranges.ts";
import { formatBdf, milliseconds } from "../../base/units.ts";
import { DEVICE_COUNTERS } from "../../device/counters.ts";
import { DRIVER_COUNTERS } from "../../driver/counters.ts";
import { monotonicClock } from "../../host/clock.ts";
import { LET_GO_MS_MAX } from "../../machine/qemu/hotplug.ts";
import { sums } from "../../memory/counters.ts";
import type { IntervalChoice } from "../../policy/pass-interval.ts";
import { createSpeculation } from "../../policy/speculation/registry.ts";
import { meanPinned } from "../../tracking/counters.ts";
import { LIVES } from "../../tracking/life.ts";
import type { TrackingCounters } from "../../tracking/tracker.ts";
import { backgroundOf } from "../background.ts";
import { claimsOf } from "../claims.ts";
import type { LiveMachine } from "../machine.ts";
import type { PluggedDisks } from "../plugged-disks.ts";
import { choosePolicy } from "../policy-choice.ts";
import type { LiveGuest } from "../run.ts";
import { speculationOf } from "../speculating.ts";
import { Refusal } from "./refusal.ts";
import * as schemas from "./schemas.ts";

/** One method of a path, with what it takes and answers. */
export interface Route {
  readonly method: "GET" | "PUT" | "POST";
  readonly path: string;
  readonly summary: string;
  readonly body?: TSchema;
  readonly answer: TSchema;
  /** `body` has been checked. `gone`: the client does not wait any more. */
  serve(guest: LiveGuest, body: unknown, gone: AbortSignal): unknown;
}

/** Types what a route serves by its schemas. */
const route = <A extends TSchema, B extends TSchema>(
  definition: Omit<Route, "body" | "answer" | "serve"> & {
    readonly body?: B;
    readonly answer: A;
    serve(guest: LiveGuest, body: Static<B>, gone: AbortSignal): Static<A> | Promise<Static<A>>;
  },
): Route => definition as Route;

export const ROUTES: readonly Route[] = [
  route({
    ...{ method: "GET", path: "/v1/state", summary: "What is so now" },
    answer: schemas.State,
    serve: ({ machine, options }) => ({
      ...claimsOf(machine, options),
      machine: machine.name,
      strategy: options.strategy,
      life: LIVES[machine.pins.life]!,
      background: backgroundOf(machine.pins),
      policy: machine.operator.policy,
      intervalMs: machine.pins.passInterval / 1e6,
      ...quotaOf(machine.pins),
      ...parkedOf(machine.pins),
      endpoints: machine.assigned.map(({ bdf }) => formatBdf(bdf)),
      uptimeMs: Math.round((monotonicClock.now() - machine.pins.startedAt) / 1e6),
    }),
  }),
  route({
    ...{ method: "GET", path: "/v1/counters", summary: "What was counted so far" },
    answer: schemas.Counters,
    serve: (guest) => ({
      tracking: trackingOf(guest),
      devices: guest.machine.assigned.flatMap(({ bdf, counters }) =>
        counters ? { endpoint: formatBdf(bdf), ...sums(DEVICE_COUNTERS, [counters]) } : [],
      ),
      driver: guest.machine.drivers && sums(DRIVER_COUNTERS, guest.machine.drivers),
    }),
  }),
  route({
    ...{ method: "GET", path: "/v1/policy", summary: "When idle frames are unpinned" },
    answer: schemas.Policy,
    serve: ({ machine }) => policyOf(machine),
  }),
  route({
    ...{ method: "PUT", path: "/v1/policy", summary: "Unpin by another policy from now on" },
    body: schemas.NewPolicy,
    answer: schemas.Policy,
    async serve({ machine }, { name, parameters, intervalMs, speculate }) {
      const { operator } = machine;
      const interval = intervalMs === undefined ? undefined : intervalOf(intervalMs);
      const speculation = speculate && choiceOf(speculate.name, speculate.parameters);
      if (speculation !== undefined) refusing("speculate", () => createSpeculation(speculation));
      if (name !== undefined || parameters !== undefined) {
        const chosen = name ?? operator.policyName;
        refusing("name", () => choosePolicy(chosen));
        const choice = choiceOf(chosen, parameters);
        refusing("parameters", () => choosePolicy(choice));
        await operator.setPolicy(choice);
      }
      if (interval !== undefined) await operator.setInterval(interval);
      if (speculation !== undefined) await operator.setSpeculation(speculation);
      return await policyOf(machine);
    },
  }),
  route({
    ...{ method: "PUT", path: "/v1/quota", summary: "Let the guest have at most so many frames pinned" },
    body: schemas.NewQuota,
    answer: schemas.Quota,
    async serve({ machine }, { quotaFrames }) {
      await machine.operator.setQuota(quotaFrames ?? Number.POSITIVE_INFINITY);
      return quotaOf(machine.pins);
    },
  }),
  route({
    ...{ method: "POST", path: "/v1/park", summary: "Unpin nothing until this is taken back" },
    body: schemas.NewParked,
    answer: schemas.Parked,
    async serve({ machine }, { parked }) {
      await machine.operator.park(parked);
      return parkedOf(machine.pins);
    },
  }),
  route({
    ...{ method: "POST", path: "/v1/unpin", summary: "Unpin now what is not mapped, lately used or not" },
    body: schemas.Range,
    answer: schemas.Unpinned,
    serve: ({ machine }, { firstFrame = 0, frames = Number.POSITIVE_INFINITY }, gone) =>
      machine.operator.unpinIdle({ first: firstFrame, end: firstFrame + frames }, gone),
  }),
  route({
    ...{ method: "PUT", path: "/v1/balloon", summary: "Leave the guest so much memory" },
    body: schemas.NewBalloon,
    answer: schemas.Balloon,
    serve: ({ machine }, { memoryMiB }, gone) => {
      if (!machine.balloon) throw new Refusal("refused", `machine ${machine.name} has no balloon`);
      return machine.balloon.resize(memoryMiB, gone);
    },
  }),
  route({
    ...{ method: "POST", path: "/v1/plug", summary: "Give the guest one more assigned disk" },
    body: schemas.NewDisk,
    answer: schemas.Disk,
    async serve(guest, disk) {
      const disks = disksOf(guest);
      const id = await disks.plug(await disks.open({ sizeMiB: 0, ...disk }));
      return { id, endpoint: formatBdf(disks.bdfOf(id)!) };
    },
  }),
  route({
    ...{ method: "POST", path: "/v1/unplug", summary: "Ask the guest to let go of a disk that was plugged" },
    body: schemas.OldDisk,
    answer: schemas.Unplugged,
    async serve(guest, { id }) {
      const disks = disksOf(guest);
      if (disks.bdfOf(id) === undefined)
        throw new Refusal("invalid", `there is no disk ${id} that was plugged`, { field: "id" });
      return { gone: await disks.unplug(id, LET_GO_MS_MAX) };
    },
  }),
  route({
    ...{
      method: "POST",
      path: "/v1/dirty/start",
      summary: "Tell what devices write from now on; copy all memory then",
    },
    answer: schemas.Tracked,
    async serve({ machine }) {
      await machine.dirty.start();
      return { dirtyTracking: true };
    },
  }),
  route({
    ...{
      method: "POST",
      path: "/v1/dirty/harvest",
      summary: "What devices have written since the last one, or may be writing",
    },
    answer: schemas.Harvest,
    async serve({ machine }) {
      const ranges = listed(await machine.dirty.harvest());
      return { frames: ranges.reduce((sum, { frames }) => sum + frames, 0), ranges };
    },
  }),
  route({
    ...{ method: "POST", path: "/v1/dirty/stop", summary: "Tell no more of it" },
    answer: schemas.Tracked,
    async serve({ machine }) {
      await machine.dirty.stop();
      return { dirtyTracking: false };
    },
  }),
];

function disksOf({ machine }: LiveGuest): PluggedDisks {
  if (!machine.disks) throw new Refusal("refused", `machine ${machine.name} takes no devices while it runs`);
  return machine.disks;
}

const quotaOf = ({ quota, framesNow }: TrackingCounters) => ({
  quotaFrames: Number.isFinite(quota) ? quota : null,
  pinned: framesNow,
});

const parkedOf = ({ parks, parkedByOperator }: TrackingCounters) => ({
  parked: parks + parkedByOperator > 0,
  parks: { guest: parks, operator: parkedByOperator > 0 },
});

/** A mistake of `what` is one of `field`. */
function refusing(field: string, what: () => void): void {
  try {
    what();
  } catch (error) {
    throw error instanceof UserError
      ? new Refusal("invalid", `${field}: ${error.message}`, { field })
      : error;
  }
}

/** As options of the command line have it. */
const choiceOf = (name: string, parameters: Readonly<Record<string, number | string>> = {}): string =>
  [name, ...Object.entries(parameters).map(([key, value]) => `${key}=${value}`)].join(",");

function intervalOf(ms: NonNullable<Static<typeof schemas.NewPolicy>["intervalMs"]>): IntervalChoice {
  if (typeof ms === "number") return milliseconds(ms);
  if (ms.min > ms.max) throw new Refusal("invalid", "intervalMs: min is above max", { field: "intervalMs" });
  return { min: milliseconds(ms.min), max: milliseconds(ms.max) };
}

async function policyOf({ operator, pins }: LiveMachine): Promise<Static<typeof schemas.Policy>> {
  const { policy, interval } = operator;
  if (!policy) throw new Refusal("refused", "this strategy unpins nothing, so it has no policy");
  const { name, parameters } = policy;
  const ms = (ns: number) => ns / 1e6;
  return {
    ...{ name, parameters, state: await operator.policyState() },
    intervalMs:
      typeof interval === "number" ? ms(interval) : { min: ms(interval.min), max: ms(interval.max) },
    intervalNowMs: ms(pins.passInterval),
    speculate: speculationOf(operator.speculation, pins),
  };
}

/** What only a driver's requests and unpin passes count is null without them. */
function trackingOf({ machine, options }: LiveGuest): Static<typeof schemas.Counters>["tracking"] {
  const { pins, started } = machine;
  const tracked = (name: keyof TrackingCounters) => (options.strategy === "coiommu" ? pins[name] : null);
  const mapped = (name: keyof TrackingCounters) => (pins.mappingsMax > 0 ? pins[name] : null);
  return {
    framesPinned: pins.framesPinned,
    framesUnpinned: pins.framesUnpinned,
    framesNow: pins.framesNow,
    ...claimsOf(machine, options),
    framesPeak: pins.framesPeak,
    framesMean: meanPinned(pins, monotonicClock.now()),
    kernelPagesPeak: started.kernelSource === "none" ? null : pins.kernelPagesPeak,
    framesBeyondNeed: mapped("framesBeyondNeed"),
    mappings: mapped("mappings"),
    mappingsLeft: Number.isFinite(pins.mappingsMax) ? mapped("mappingsLeft") : null,
    pinRequests: tracked("pinRequests"),
    pinRequestsRefused: tracked("pinRequestsRefused"),
    framesFirmware: tracked("framesFirmware"),
    framesFaulted: tracked("framesFaulted"),
    framesMapped: tracked("framesMapped"),
    framesCameBack: tracked("framesCameBack"),
    framesSpeculative: tracked("framesSpeculative"),
    passes: tracked("passes"),
  };
}
