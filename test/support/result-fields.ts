import type { RunResult } from "../../src/control/result.ts";

/** Paths to the values of T: of an array, those of its elements; of a record with free names, the record. */
type PathOf<T> = [T] extends [never]
  ? ""
  : T extends readonly (infer E)[]
    ? PathOf<E>
    : T extends object
      ? string extends keyof T
        ? ""
        : { [K in keyof T & string]: Joined<K, PathOf<NonNullable<T[K]>>> }[keyof T & string]
      : "";
type Joined<K extends string, P extends string> = P extends "" ? K : `${K}.${P}`;

/** Every field of `coiommu run --json`; the type says which, so that the list is never behind. */
const FIELDS: Record<PathOf<RunResult>, true> = {
  schema: true,
  "host.cpus": true,
  "host.memoryMiB": true,
  "host.kernel": true,
  "host.node": true,
  "host.qemu": true,
  "host.accel": true,
  "guest.machine": true,
  "guest.memoryMiB": true,
  "guest.cpus": true,
  "guest.kernel": true,
  strategy: true,
  policy: true,
  policyParameters: true,
  intervalMs: true,
  pinner: true,
  device: true,
  seed: true,
  "creation.pinMs": true,
  "creation.toFirstInstructionMs": true,
  "creation.toUserspaceMs": true,
  "workload.name": true,
  "workload.options": true,
  "workload.ops": true,
  "workload.iops": true,
  "workload.bytesPerSecond": true,
  "workload.latencyUs.p50": true,
  "workload.latencyUs.p99": true,
  "workload.verified": true,
  "workload.errors": true,
  "maps.map": true,
  "maps.unmap": true,
  "maps.framesMapped": true,
  "maps.framesUnmapped": true,
  "maps.liveAtEnd": true,
  "maps.mapRequests": true,
  "maps.unmapRequests": true,
  "maps.exits": true,
  "steady.maps": true,
  "steady.pinRequests": true,
  "steady.remapRequests": true,
  "steady.exits": true,
  "pins.requests": true,
  "pins.refused": true,
  "pins.framesPinned": true,
  "pins.framesUnpinned": true,
  "pins.framesFirmware": true,
  "pins.framesFaulted": true,
  "pins.framesCameBack": true,
  "pins.framesSpeculative": true,
  "pins.speculation.name": true,
  "pins.speculation.parameters": true,
  "pins.speculation.saved": true,
  "pins.speculation.wasted": true,
  "pins.speculation.stopped": true,
  "pins.framesPeak": true,
  "pins.framesMean": true,
  "pins.framesAtEnd": true,
  "pins.framesClaimed": true,
  "pins.framesNeverTransferred": true,
  "pins.quotaFrames": true,
  "kernel.pinnedPagesPeak": true,
  "kernel.source": true,
  "kernel.mappings.peak": true,
  "kernel.mappings.limit": true,
  "kernel.mappings.framesBeyondNeedPeak": true,
  "dma.transfers": true,
  "dma.bytes": true,
  "dma.faults": true,
  "samples.ms": true,
  "samples.pinned": true,
  "samples.mapped": true,
  "samples.requests": true,
};

/** Fields that `result`, parsed JSON, has too many or too few; a null stands for all that would be below it. */
export function fieldDifferences(result: object): string[] {
  const found = new Set(pathsOf(result));
  const expected = Object.keys(FIELDS);
  const covered = (path: string) => found.has(path) || [...found].some((f) => path.startsWith(`${f}.`));
  const known = (path: string) => expected.some((e) => e === path || e.startsWith(`${path}.`));
  return [
    ...expected.filter((path) => !covered(path)).map((path) => `${path} is missing`),
    ...[...found].filter((path) => !known(path)).map((path) => `${path} is not a field`),
  ];
}

const FREE: readonly string[] = ["workload.options", "policyParameters", "pins.speculation.parameters"];

function pathsOf(value: unknown, at = ""): string[] {
  if (FREE.includes(at) || value === null || typeof value !== "object") return [at];
  if (Array.isArray(value)) return value.flatMap((element) => pathsOf(element, at));
  return Object.entries(value).flatMap(([key, inner]) => pathsOf(inner, at === "" ? key : `${at}.${key}`));
}
