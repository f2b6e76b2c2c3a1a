import fs from "node:fs";
import readline from "node:readline";
import { UserError } from "../base/errors.ts";
import { type Bdf, FRAME_SIZE } from "../base/units.ts";
import { LOG_FORMAT, type LoggedEvent, type LogHeader, parseEvent } from "../wire/event-log.ts";

/** What a guest's drivers mapped and unmapped, in the order of time. */
export interface Trace {
  readonly file: string;
  readonly header: LogHeader;
  readonly events: readonly TraceEvent[];
  /** Above all frames of the events, and the guest's memory. */
  readonly framesEnd: number;
  readonly lines: number;
  /** Lines that are no event; the number of the first one. */
  readonly malformed: number;
  readonly firstMalformed: number | null;
  /** Events that the recorder knows to have lost. */
  readonly lost: number;
  /** Frames that an event unmaps although they are not mapped: what was mapped before the recording, or got lost. */
  readonly unmatchedUnmaps: number;
  /** Frames pinned and unpinned by the run that was recorded. */
  readonly recorded: { readonly pinned: number; readonly unpinned: number };
}

/** A mapping operation, or the end of one. Times in ns since the first event. */
export type TraceEvent = Omit<LoggedEvent, "kind" | "source"> & {
  readonly kind: "map" | "unmap";
  readonly endpoint: Bdf;
};

/** Written where events are missing. */
const LOST = /^# lost (\d{1,15})$/;

/** Malformed lines are counted, never fatal. Throws UserError for a file that is no event log. */
export async function readTrace(file: string): Promise<Trace> {
  const input = fs.createReadStream(file);
  const failed = new Promise<never>((_, reject) => {
    input.once("error", (error) => reject(new UserError(`${file}: ${error.message}`)));
  });
  return await Promise.race([failed, parseLines(file, readline.createInterface({ input, crlfDelay: 100 }))]);
}

/** The same for lines that are there already. */
export async function parseLines(
  file: string,
  lines: AsyncIterable<string> | Iterable<string>,
): Promise<Trace> {
  let header: LogHeader | undefined;
  let [count, malformed, lost] = [0, 0, 0];
  let firstMalformed: number | null = null;
  const recorded = { pinned: 0, unpinned: 0 };
  const events: TraceEvent[] = [];
  for await (const line of lines) {
    count++;
    if (!header) {
      header = headerOf(line);
      if (!header)
        throw new UserError(
          `${file}: its first line is not that of a log that \`coiommu run --record\` writes`,
        );
      continue;
    }
    const gap = LOST.exec(line);
    const event = gap ? undefined : parseEvent(line);
    if (gap) lost += Number(gap[1]);
    else if (!event) {
      malformed++;
      firstMalformed ??= count;
    } else if (event.kind === "pinned" || event.kind === "unpinned") recorded[event.kind] += framesOf(event);
    else if (event.source)
      events.push({
        time: event.time,
        kind: event.kind,
        endpoint: event.source.endpoint,
        ranges: event.ranges,
      });
    else malformed++;
  }
  if (!header) throw new UserError(`${file}: is empty`);
  const { matched, unmatchedUnmaps } = matchedOf(events.toSorted((a, b) => a.time - b.time));
  const ends = matched.flatMap(({ ranges }) => ranges.map(([first, n]) => first + n));
  const framesEnd = ends.reduce((a, b) => Math.max(a, b), (header.memoryMiB * 2 ** 20) / FRAME_SIZE);
  return {
    file,
    header,
    events: matched,
    framesEnd,
    lines: count,
    malformed,
    firstMalformed,
    lost,
    unmatchedUnmaps,
    recorded,
  };
}

export const framesOf = ({ ranges }: Pick<LoggedEvent, "ranges">): number =>
  ranges.reduce((sum, [, n]) => sum + n, 0);

function headerOf(line: string): LogHeader | undefined {
  try {
    const header = JSON.parse(line) as LogHeader;
    const { format, memoryMiB, machine, workload } = header;
    const texts = typeof machine === "string" && typeof workload === "string";
    const memory = Number.isInteger(memoryMiB) && memoryMiB >= 1 && memoryMiB <= 2 ** 20;
    return format === LOG_FORMAT && memory && texts ? header : undefined;
  } catch {
    return undefined;
  }
}

/** Without unmaps of what is not mapped, and with times from the first event on. */
function matchedOf(events: readonly TraceEvent[]): { matched: TraceEvent[]; unmatchedUnmaps: number } {
  const mapped = new Map<number, number>();
  const began = events[0]?.time ?? 0;
  const matched: TraceEvent[] = [];
  let unmatchedUnmaps = 0;
  for (const event of events) {
    const ranges: [first: number, frames: number][] = [];
    for (const [first, n] of event.ranges)
      for (let gfn = first; gfn < first + n; gfn++) {
        const count = (mapped.get(gfn) ?? 0) + (event.kind === "map" ? 1 : -1);
        if (count < 0) {
          unmatchedUnmaps++;
          continue;
        }
        mapped.set(gfn, count);
        const last = ranges.at(-1);
        if (last && gfn > first && gfn === last[0] + last[1]) last[1]++;
        else ranges.push([gfn, 1]);
      }
    if (ranges.length > 0) matched.push({ ...event, ranges, time: event.time - began });
  }
  return { matched, unmatchedUnmaps };
}
