import { type Bdf, FRAME_SIZE, gfnOf, type Nanoseconds, parseBdf } from "../../base/units.ts";
import { type LoggedEvent, type LoggedRange, RANGES_MAX } from "../../wire/event-log.ts";

/** A line of tracefs: `TASK-PID [CPU] SECONDS.MICROSECONDS: EVENT: …`. Linux, Documentation/trace/ftrace.rst. */
const LINE = /^.{1,24}-\d{1,10} +\[(\d{3,4})\] +(\d{1,10})\.(\d{6}): (\w{1,40}): (.*)$/;
/** What the events of guest/linux/trace.h print. */
const SEGMENT = /^(\S{1,16}) addr=([0-9a-f]{1,13}) size=(\d{1,15}) left=(\d{1,5})$/;
const KINDS: ReadonlyMap<string, "map" | "unmap"> = new Map([
  ["coiommu_map", "map"],
  ["coiommu_unmap", "unmap"],
]);

/** Longer than any line of ours. */
export const TRACE_LINE_MAX = 256;

interface TraceLine {
  readonly cpu: number;
  /** By the clock of the guest's trace. */
  readonly time: Nanoseconds;
  readonly event: string;
  readonly text: string;
}

/** Undefined for a line that is none. */
function parseTraceLine(line: string): TraceLine | undefined {
  const [, cpu, seconds, microseconds, event, text] = LINE.exec(line) ?? [];
  if (text === undefined) return undefined;
  const time = (Number(seconds) * 1e9 + Number(microseconds) * 1e3) as Nanoseconds;
  return { cpu: Number(cpu), time, event: event!, text };
}

/** All that is looked at in search of a mark, in characters. */
const MARKS_TEXT_MAX = 65_536;

/** When a mark of the guest's agent was written; undefined when it is not there. */
export function findMark(trace: string, mark: number): Nanoseconds | undefined {
  const lines = trace.slice(-MARKS_TEXT_MAX).split("\n").map(parseTraceLine);
  return lines.find((line) => line?.event === "tracing_mark_write" && line.text === String(mark))?.time;
}

/** One mapping operation, or its end, of the guest's driver. */
export type TracedOperation = LoggedEvent & { readonly source: NonNullable<LoggedEvent["source"]> };

export interface TraceBounds {
  readonly cpus: number;
  /** Frame numbers are below it. */
  readonly frames: number;
  /** When the guest's first and its last event can have been, by its trace's clock. */
  readonly from: Nanoseconds;
  readonly to: Nanoseconds;
}

interface Segment {
  readonly cpu: number;
  readonly time: Nanoseconds;
  readonly kind: "map" | "unmap";
  readonly endpoint: Bdf;
  readonly range: LoggedRange;
  readonly left: number;
}

/** A list of which not all segments have come. */
interface OpenList {
  readonly first: Segment;
  readonly ranges: LoggedRange[];
}

/**
 * Reads the module's trace events, line by line, and puts lists together. The guest can write anything: what is no
 * event, or breaks a bound, is counted and left out; no more is kept than one list for each CPU.
 */
export class TraceReader {
  /** In operations that were handed on. */
  segments = 0;
  malformed = 0;
  readonly #bounds: TraceBounds;
  readonly #take: (operation: TracedOperation) => void;
  /** By CPU. */
  readonly #last: Nanoseconds[];
  readonly #open: (OpenList | undefined)[];

  constructor(bounds: TraceBounds, take: (operation: TracedOperation) => void) {
    this.#bounds = bounds;
    this.#take = take;
    this.#last = new Array<Nanoseconds>(bounds.cpus).fill(bounds.from);
    this.#open = new Array<OpenList | undefined>(bounds.cpus).fill(undefined);
  }

  line(text: string): void {
    if (text.startsWith("#") || text === "") return;
    const segment = this.#parse(text);
    if (!segment) {
      this.malformed++;
      return;
    }
    const { cpu, time, kind, endpoint, left } = segment;
    this.#last[cpu] = time;
    const open = this.#open[cpu];
    const follows = open !== undefined && continues(open, segment);
    if (open && !follows) this.#drop(cpu);
    const { first, ranges } = follows ? open : { first: segment, ranges: [] };
    ranges.push(segment.range);
    if (left > 0) {
      this.#open[cpu] = { first, ranges };
      return;
    }
    this.#open[cpu] = undefined;
    this.segments += ranges.length;
    this.#take({ time: first.time, kind, source: { cpu, endpoint }, ranges });
  }

  /** After the last line. */
  end(): void {
    for (const cpu of this.#open.keys()) this.#drop(cpu);
  }

  #drop(cpu: number): void {
    this.malformed += this.#open[cpu]?.ranges.length ?? 0;
    this.#open[cpu] = undefined;
  }

  #parse(text: string): Segment | undefined {
    const line = parseTraceLine(text);
    const kind = line && KINDS.get(line.event);
    const [, bdf, hex, bytes, more] = (kind && SEGMENT.exec(line.text)) || [];
    if (!line || !kind || more === undefined) return undefined;
    const [addr, size, left] = [Number.parseInt(hex!, 16), Number(bytes), Number(more)];
    const endpoint = parseBdf(bdf!);
    const { cpus, frames, to } = this.#bounds;
    const { cpu, time } = line;
    if (endpoint === undefined || cpu >= cpus || left >= RANGES_MAX) return undefined;
    if (time < this.#last[cpu]! || time > to) return undefined;
    if (size < 1 || addr + size > frames * FRAME_SIZE) return undefined;
    const first = gfnOf(addr);
    return { cpu, time, kind, endpoint, left, range: [first, gfnOf(addr + size - 1) - first + 1] };
  }
}

const continues = ({ first, ranges }: OpenList, { kind, endpoint, left }: Segment): boolean =>
  kind === first.kind && endpoint === first.endpoint && left === first.left - ranges.length;
