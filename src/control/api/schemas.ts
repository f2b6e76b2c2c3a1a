/** What the API takes and answers: types, checks of requests, and the OpenAPI document, from one text. */
import { type Static, Type } from "typebox";
import { GFN_LIMIT } from "../../base/units.ts";
import { DEVICE_COUNTERS } from "../../device/counters.ts";
import { DRIVER_COUNTERS } from "../../driver/counters.ts";
import { STOPPED_BY } from "../../tracking/background-pins.ts";
import { LIVES } from "../../tracking/life.ts";
import { LISTED_MAX } from "../operator.ts";
import { STRATEGIES } from "../strategy.ts";

const Count = Type.Integer({ minimum: 0 });
const nullable = <T extends Type.TSchema>(schema: T) => Type.Union([schema, Type.Null()]);
const exactly = <P extends Type.TProperties>(properties: P) =>
  Type.Object(properties, { additionalProperties: false });
const counted = <N extends string>(names: readonly N[]) =>
  Object.fromEntries(names.map((name) => [name, Count])) as Record<N, typeof Count>;

const Milliseconds = Type.Number({ minimum: 10, maximum: 3_600_000 });
const IntervalMs = {
  ...Type.Union([Milliseconds, exactly({ min: Milliseconds, max: Milliseconds })]),
  description: "Time between unpin passes; with bounds it adapts itself",
};
const PolicyInEffect = exactly({
  name: { ...Type.String(), description: "Of `coiommu policies`, or of a file" },
  parameters: {
    ...Type.Record(Type.String(), Type.Union([Type.Number(), Type.String()])),
    description: "Times in ms, shares from 0 to 1",
  },
});
const Speculate = exactly({
  name: { ...Type.String(), description: "Of `coiommu policies`" },
  parameters: PolicyInEffect.properties.parameters,
  saved: { ...Count, description: "Frames pinned unasked that the guest has used since" },
  wasted: { ...Count, description: "Those that were unpinned before it did" },
  stopped: {
    ...nullable(Type.String()),
    description: "Why it has switched itself off, until it is set again or the machine is reset",
  },
});
export const Policy = exactly({
  ...PolicyInEffect.properties,
  speculate: { ...Speculate, description: "What is pinned beside what the guest asks for" },
  state: { ...Type.Record(Type.String(), Type.Number()), description: "What it has learnt" },
  intervalMs: IntervalMs,
  intervalNowMs: { ...Type.Number({ minimum: 0 }), description: "What an adaptive one has come to" },
});
export const NewPolicy = Type.Object(
  {
    name: Type.Optional({
      ...Type.String({ minLength: 1 }),
      description: "As --policy takes it, a file too. The present one keeps what it knows",
    }),
    parameters: Type.Optional(PolicyInEffect.properties.parameters),
    intervalMs: Type.Optional(IntervalMs),
    speculate: Type.Optional(
      exactly({
        name: { ...Type.String({ minLength: 1 }), description: "The present one keeps what it knows" },
        parameters: Type.Optional(PolicyInEffect.properties.parameters),
      }),
    ),
  },
  { additionalProperties: false, minProperties: 1 },
);

const QuotaFrames = nullable(Type.Integer({ minimum: 0, maximum: GFN_LIMIT, description: "null: no limit" }));
export const NewQuota = exactly({ quotaFrames: QuotaFrames });
export const Quota = exactly({
  quotaFrames: QuotaFrames,
  pinned: { ...Count, description: "Frames pinned now; more than the quota until enough of them are idle" },
});

export const NewParked = exactly({ parked: Type.Boolean() });
export const Parked = exactly({
  parked: { ...Type.Boolean(), description: "Nothing is unpinned" },
  parks: exactly({ guest: { ...Count, description: "Parks nest" }, operator: Type.Boolean() }),
});

export const Range = exactly({
  firstFrame: Type.Optional(Type.Integer({ minimum: 0, maximum: GFN_LIMIT, description: "0 if left out" })),
  frames: Type.Optional(
    Type.Integer({ minimum: 1, maximum: GFN_LIMIT, description: "to the end if left out" }),
  ),
});
const FrameRange = exactly({ firstFrame: Count, frames: Count });
export const Unpinned = exactly({
  unpinned: Count,
  stayed: {
    ...Count,
    description: "Frames of the range that are mapped, or that the host did not let go of",
  },
  stayedRanges: {
    ...nullable(Type.Array(FrameRange)),
    description: `Which: their memory must not be discarded. null: more than ${LISTED_MAX}; ask for smaller ranges`,
  },
});

const MemoryMiB = Type.Integer({ minimum: 1, maximum: 2 ** 20 });
export const NewBalloon = exactly({ memoryMiB: MemoryMiB });
export const Balloon = exactly({
  memoryMiB: { ...Type.Number({ minimum: 0 }), description: "What the guest has now; it may stop half way" },
  unpinned: { ...Count, description: "Frames that were in the balloon and pinned" },
  stayed: {
    ...Count,
    description: "Frames without memory that are mapped, or that the host did not let go of",
  },
});

export const NewDisk = exactly({
  file: { ...Type.String({ minLength: 1 }), description: "A raw image" },
  faultCapable: Type.Optional({
    ...Type.Boolean(),
    description: "It may fault on its buffers; the guest's driver must be told so too. false if left out",
  }),
});
const DiskId = Type.String({ description: "Of the answer to /v1/plug" });
export const Disk = exactly({ id: DiskId, endpoint: Type.String() });
export const OldDisk = exactly({ id: DiskId });
export const Unplugged = exactly({
  gone: { ...Type.Boolean(), description: "false: not in time; it may still go" },
});

export const Tracked = exactly({
  dirtyTracking: { ...Type.Boolean(), description: "Whether writes of devices are told from now on" },
});
export const Harvest = exactly({
  frames: Count,
  ranges: Type.Array(FrameRange, {
    description: "In no order; copy each after this answer. An answer that got lost: start anew",
  }),
});

const Claims = exactly({
  framesClaimed: { ...nullable(Count), description: "Pinned frames that the guest's driver has asked for" },
  framesNeverTransferred: {
    ...nullable(Count),
    description: "Of them, those that no device's DMA has reached since. null: it cannot be seen",
  },
});

export const State = exactly({
  machine: Type.Enum(["qemu", "embedded"]),
  strategy: Type.Enum([...STRATEGIES]),
  life: Type.Enum([...LIVES]),
  background: nullable(
    exactly({
      pinned: Count,
      frames: { ...Count, description: "All of the guest's memory, which is to be pinned" },
      stopped: nullable(Type.Enum([...STOPPED_BY], { description: "It goes on when this allows it" })),
    }),
  ),
  policy: nullable(PolicyInEffect),
  intervalMs: { ...Type.Number({ minimum: 0 }), description: "Between unpin passes, now" },
  ...Quota.properties,
  ...Claims.properties,
  ...Parked.properties,
  endpoints: Type.Array(Type.String(), { description: "Assigned devices" }),
  uptimeMs: Count,
});

/** With the fields of an untracked guest null, as everywhere. */
const Tracking = exactly({
  framesPinned: Count,
  framesUnpinned: Count,
  framesNow: Count,
  ...Claims.properties,
  framesPeak: Count,
  framesMean: Type.Number({ minimum: 0 }),
  kernelPagesPeak: nullable(Count),
  framesBeyondNeed: { ...nullable(Count), description: "Of framesNow, pinned only because others are" },
  mappings: { ...nullable(Count), description: "Mappings of the IOMMU; null without one" },
  mappingsLeft: { ...nullable(Count), description: "Mappings that the kernel allows beside them" },
  pinRequests: nullable(Count),
  pinRequestsRefused: nullable(Count),
  framesFirmware: nullable(Count),
  framesFaulted: nullable(Count),
  framesMapped: nullable(Count),
  framesSpeculative: { ...nullable(Count), description: "Pinned beside what the guest had asked for" },
  framesCameBack: {
    ...nullable(Count),
    description: "Frames that were unpinned, and asked for again within an interval between passes",
  },
  passes: nullable(Count),
});
export const Counters = exactly({
  tracking: Tracking,
  devices: Type.Array(exactly({ endpoint: Type.String(), ...counted(DEVICE_COUNTERS) })),
  driver: nullable(exactly(counted(DRIVER_COUNTERS))),
});

const FAILURES = [
  "invalid",
  "not_found",
  "method_not_allowed",
  "refused",
  "too_large",
  "host",
  "internal",
  "unavailable",
] as const;
export const Failure = exactly({
  error: exactly({
    code: Type.Enum(FAILURES),
    message: Type.String(),
    field: nullable(Type.String({ description: "Of the request's body, for code invalid" })),
    errno: nullable(Type.String({ description: "For code host" })),
  }),
});
export type Failure = Static<typeof Failure>;
